//! The audit of a fast policy: a share of the samples is also scored by the reference policy, and both are compared.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::class::Classes;
use crate::ids::{ClassIndex, SampleId};
use crate::interval::wilson;
use crate::policy::Policy;

/// Which samples are audited, and by what.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Audit {
    /// The share of samples.
    pub share: Share,
    /// The policy that they are also scored by.
    pub policy: Policy,
}

/// A share of the samples, above 0 and at most 1.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Share(f64);

impl FromStr for Share {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let percent = text.strip_suffix('%').and_then(|number| number.trim().parse::<f64>().ok());
        match percent {
            Some(percent) if percent > 0.0 && percent <= 100.0 => Ok(Self(percent / 100.0)),
            _ => Err(format!("'{text}' is no share of the images: give one like 1%, above 0% and up to 100%")),
        }
    }
}

impl fmt::Display for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}%", self.0 * 100.0)
    }
}

impl Audit {
    /// Whether the sample with this key is audited, in a job with this seed: as good as random, and always the same.
    pub fn covers(&self, seed: u64, key: &str) -> bool {
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"audit").update(&seed.to_le_bytes()).update(key.as_bytes());
        let mut bytes = [0; 8];
        hasher.finalize_xof().fill(&mut bytes);
        (u64::from_le_bytes(bytes) >> 11) as f64 / (1u64 << 53) as f64 <= self.share.0
    }
}

/// What both policies say of one sample.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Audited {
    /// The sample.
    pub sample: SampleId,
    /// Its path relative to the source.
    pub key: String,
    /// The label the dataset brings.
    pub label: Option<String>,
    /// The class that was predicted.
    pub class: ClassIndex,
    /// The evaluations it took.
    pub evaluations: u32,
    /// The class by the reference.
    pub reference_class: ClassIndex,
    /// The evaluations that took.
    pub reference_evaluations: u32,
}

/// What an audit found. Shares are in [0, 1], intervals are Wilson's at 95 %.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct AuditReport {
    /// Samples audited.
    pub samples: u64,
    /// The share of them whose class is the reference's.
    pub agreement: f64,
    /// Its interval.
    pub agreement_interval: (f64, f64),
    /// Of them, samples with a label that is a class.
    pub labelled: u64,
    /// The share of these that got their label's class; none where there are none.
    pub accuracy: Option<f64>,
    /// The reference's.
    pub reference_accuracy: Option<f64>,
    /// Evaluations of an audited sample.
    pub evaluations: f64,
    /// Evaluations the reference takes for it.
    pub reference_evaluations: f64,
}

/// An audit's report in the making.
#[derive(Clone, Debug, Default)]
pub struct AuditBuilder {
    classes: Classes,
    samples: u64,
    agreeing: u64,
    labelled: u64,
    right: u64,
    reference_right: u64,
    evaluations: u64,
    reference_evaluations: u64,
}

impl AuditBuilder {
    /// An audit among some classes.
    pub fn new(classes: &Classes) -> Self {
        Self { classes: classes.clone(), ..Self::default() }
    }

    /// Takes a sample in.
    pub fn add(&mut self, row: &Audited) {
        self.samples += 1;
        self.agreeing += u64::from(row.class == row.reference_class);
        self.evaluations += u64::from(row.evaluations);
        self.reference_evaluations += u64::from(row.reference_evaluations);
        if let Some(truth) = row.label.as_deref().and_then(|label| self.classes.with_label(label)) {
            self.labelled += 1;
            self.right += u64::from(row.class == truth);
            self.reference_right += u64::from(row.reference_class == truth);
        }
    }

    /// What was found; none where nothing was audited.
    pub fn finish(self) -> Option<AuditReport> {
        if self.samples == 0 {
            return None;
        }
        let of_labelled = |right: u64| (self.labelled > 0).then(|| right as f64 / self.labelled as f64);
        let each = |sum: u64| sum as f64 / self.samples as f64;
        Some(AuditReport {
            samples: self.samples,
            agreement: each(self.agreeing),
            agreement_interval: wilson(self.agreeing, self.samples),
            labelled: self.labelled,
            accuracy: of_labelled(self.right),
            reference_accuracy: of_labelled(self.reference_right),
            evaluations: each(self.evaluations),
            reference_evaluations: each(self.reference_evaluations),
        })
    }
}

impl fmt::Display for AuditReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (low, high) = self.agreement_interval;
        writeln!(
            f,
            "audit: {} images were also scored by the reference, which agrees on {:.2} % (95 % interval {:.2} to {:.2} %)",
            self.samples,
            100.0 * self.agreement,
            100.0 * low,
            100.0 * high
        )?;
        if let (Some(own), Some(reference)) = (self.accuracy, self.reference_accuracy) {
            writeln!(
                f,
                "  of {} with a known label {:.2} % right, the reference {:.2} %",
                self.labelled,
                100.0 * own,
                100.0 * reference
            )?;
        }
        writeln!(
            f,
            "  {:.1} evaluations an image, the reference {:.1}: {:.1}x fewer",
            self.evaluations,
            self.reference_evaluations,
            self.reference_evaluations / self.evaluations.max(1.0)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn audit(share: &str) -> Audit {
        Audit { share: share.parse().unwrap(), policy: Policy::reference(&[1], &[10], 1).unwrap() }
    }

    #[test]
    fn a_share_of_the_samples_is_audited_and_always_the_same() {
        let covered = |share, seed| (0..10_000).filter(|i| audit(share).covers(seed, &format!("{i}.png"))).count();
        let one = covered("1%", 0);
        assert!((70..130).contains(&one), "{one}");
        assert_eq!(covered("1%", 0), one);
        assert_eq!(covered("100%", 0), 10_000);
        assert!((0..1000).all(|i| !audit("1%").covers(0, &i.to_string()) || audit("10%").covers(0, &i.to_string())));
        assert!(["0%", "101%", "x%", "5", "-1%"].iter().all(|text| text.parse::<Share>().is_err()));
    }

    #[test]
    fn both_policies_are_compared() {
        let classes = Classes::parse("ant\nbee\ncat", &[]).unwrap();
        let row = |id, label: Option<&str>, class, reference| Audited {
            sample: SampleId(id),
            key: format!("{id}.png"),
            label: label.map(str::to_owned),
            class: ClassIndex(class),
            evaluations: 20,
            reference_class: ClassIndex(reference),
            reference_evaluations: 300,
        };
        let rows =
            [row(0, Some("ant"), 0, 0), row(1, Some("bee"), 2, 1), row(2, None, 1, 1), row(3, Some("cat"), 2, 2)];
        let mut builder = AuditBuilder::new(&classes);
        assert_eq!(builder.clone().finish(), None);
        rows.iter().for_each(|row| builder.add(row));
        let report = builder.finish().unwrap();
        assert_eq!((report.samples, report.labelled, report.agreement), (4, 3, 0.75));
        assert_eq!((report.accuracy, report.reference_accuracy), (Some(2.0 / 3.0), Some(1.0)));
        assert_eq!((report.evaluations, report.reference_evaluations), (20.0, 300.0));
        assert!(report.to_string().contains("15.0x fewer"), "{report}");
    }
}
