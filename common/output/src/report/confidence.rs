//! How sure a job is of its predictions, as text.

use std::fmt;

use elbo_core::calibration::{Confidence, Source};

/// Writes a job's calibration, how good it is, and the figures of a reliability diagram.
pub(super) fn write(confidence: &Confidence, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    let calibration = confidence.calibration;
    let Some(findings) = &confidence.findings else {
        return writeln!(f, "confidence by another job's calibration, with nothing here to check it against");
    };
    let reliability = &findings.reliability;
    match findings.source {
        Source::Labels => writeln!(f, "confidence, judged by {} images with a known label", reliability.samples)?,
        Source::Audit => {
            writeln!(f, "confidence that the reference agrees, by {} audited images", reliability.samples)?
        }
    }
    writeln!(
        f,
        "  temperature {:.2e} (evaluations / {:.0})^{:.2}; eliminated classes count {:.2}",
        calibration.temperature, calibration.typical, calibration.growth, calibration.left
    )?;
    writeln!(f, "  expected calibration error {:6.2} %", 100.0 * reliability.ece)?;
    writeln!(
        f,
        "  of a softmax of raw errors {:6.2} %, which says {:.4} on average",
        100.0 * findings.softmax_ece,
        findings.softmax
    )?;
    writeln!(f, "  confidence          images     mean    right")?;
    reliability.bins.iter().try_for_each(|bin| {
        writeln!(
            f,
            "  {:5.1} to {:5.1} %  {:>8}  {:5.1} %  {:5.1} %",
            100.0 * bin.from,
            100.0 * bin.to,
            bin.samples,
            100.0 * bin.confidence,
            100.0 * bin.accuracy
        )
    })
}
