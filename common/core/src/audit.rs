//! The audit of a fast policy: the reference policy also scores a share of the samples, and the two are compared.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::class::Classes;
use crate::draw::Draw;
use crate::ids::{ClassIndex, SampleId};
use crate::interval::wilson;
use crate::policy::Policy;

/// Which samples are audited, and by which policy.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Audit {
    /// The share of samples.
    pub share: Share,
    /// The policy that also scores them.
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
            _ => Err(format!("'{text}' is not a share of the images: use one above 0% and up to 100%, like 1%")),
        }
    }
}

impl fmt::Display for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}%", self.0 * 100.0)
    }
}

impl Audit {
    /// Whether the sample with this key is audited in a job with this seed. The choice is pseudorandom but always the same.
    pub fn covers(&self, seed: u64, key: &str) -> bool {
        Draw::new("audit", Some(seed), key).fraction() <= self.share.0
    }
}

/// The results of both policies for one sample.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Audited {
    /// The sample.
    pub sample: SampleId,
    /// Its path relative to the source.
    pub key: String,
    /// The label from the dataset.
    pub label: Option<String>,
    /// The predicted class.
    pub class: ClassIndex,
    /// The evaluations used for it.
    pub evaluations: u32,
    /// The reference policy's class.
    pub reference_class: ClassIndex,
    /// The evaluations used by the reference policy.
    pub reference_evaluations: u32,
}

/// The result of an audit. Shares are in [0, 1]; intervals are Wilson's at 95 %.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct AuditReport {
    /// Samples audited.
    pub samples: u64,
    /// The share of them where both policies give the same class.
    pub agreement: f64,
    /// The interval of `agreement`.
    pub agreement_interval: (f64, f64),
    /// Audited samples whose label is one of the classes.
    pub labelled: u64,
    /// The share of labelled samples whose predicted class is their label; `None` if no sample has a label.
    pub accuracy: Option<f64>,
    /// The same share for the reference policy.
    pub reference_accuracy: Option<f64>,
    /// Mean evaluations per audited sample.
    pub evaluations: f64,
    /// Mean evaluations per audited sample for the reference policy.
    pub reference_evaluations: f64,
}

/// Builds an [`AuditReport`].
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
    /// An empty audit of a job with these classes.
    pub fn new(classes: &Classes) -> Self {
        Self { classes: classes.clone(), ..Self::default() }
    }

    /// Adds a sample.
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

    /// The report; `None` if no sample was audited.
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
