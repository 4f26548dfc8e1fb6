//! The schedules that the reference code ships for its datasets (Li et al. 2023, table of commands).

use std::fmt;
use std::str::FromStr;

use crate::loss::Loss;
use crate::policy::{Policy, Stage};

macro_rules! presets {
    ($($(#[$doc:meta])* $variant:ident = $name:literal: keep $keep:expr, samples $samples:expr, $loss:ident;)*) => {
        /// A named reference schedule: policy, keep, samples and loss.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Preset {
            $($(#[$doc])* $variant,)*
        }

        impl Preset {
            /// Every preset.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// The name on the command line.
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            /// `(keep, samples)` of every stage.
            fn stages(self) -> (&'static [u32], &'static [u32]) {
                match self { $(Self::$variant => (&$keep, &$samples),)* }
            }

            /// The loss the schedule was published with.
            pub fn loss(self) -> Loss {
                match self { $(Self::$variant => Loss::$loss,)* }
            }
        }
    };
}

presets! {
    /// Oxford-IIIT Pets, 37 classes.
    Pets = "pets": keep [5, 1], samples [25, 250], L1;
    /// CIFAR-10.
    Cifar10 = "cifar10": keep [5, 1], samples [50, 500], L1;
    /// STL-10.
    Stl10 = "stl10": keep [5, 1], samples [100, 500], L1;
    /// Food-101.
    Food = "food": keep [20, 10, 5, 1], samples [20, 50, 100, 500], L2;
    /// FGVC Aircraft, 100 classes.
    Aircraft = "aircraft": keep [20, 10, 5, 1], samples [20, 50, 100, 500], L2;
    /// Flowers-102.
    Flowers = "flowers": keep [20, 10, 5, 1], samples [20, 50, 100, 500], L1;
    /// ObjectNet, 113 classes.
    Objectnet = "objectnet": keep [25, 10, 5, 1], samples [50, 100, 500, 1000], L2;
    /// ImageNet, 1000 classes.
    Imagenet = "imagenet": keep [500, 50, 10, 1], samples [50, 100, 500, 1000], L2;
}

impl Preset {
    /// How many prompts each stage keeps.
    pub fn keep(self) -> &'static [u32] {
        self.stages().0
    }

    /// The timesteps of each stage.
    pub fn samples(self) -> &'static [u32] {
        self.stages().1
    }

    /// The preset's policy, with one noise per timestep.
    pub fn policy(self) -> Policy {
        let stages = self.keep().iter().zip(self.samples()).map(|(&keep, &samples)| Stage { samples, keep });
        Policy::Reference { stages: stages.collect(), trials: 1 }
    }
}

impl fmt::Display for Preset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Preset {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL.iter().copied().find(|p| p.name() == text).ok_or_else(|| {
            let names: Vec<_> = Self::ALL.iter().map(|p| p.name()).collect();
            format!("unknown preset '{text}': use one of {}", names.join(", "))
        })
    }
}
