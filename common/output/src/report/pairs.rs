//! Text, image and group score of pairs of images with the same two captions, as defined by Winoground (Thrush et al., CVPR
//! 2022, section 3.1), with errors instead of similarities.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;

use elbo_core::class::Classes;
use elbo_core::ids::ClassIndex;
use elbo_core::interval::wilson;
use elbo_core::prediction::{Prediction, Score};
use elbo_core::sample::Sample;

/// The most pairs without a score that are listed.
const INCOMPLETE_SHOWN: usize = 20;

/// The scores of a job's pairs. Serialised as `pairs` in the output of `elbo report --json`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PairScores {
    /// Pairs with scores.
    pub n: u64,
    /// Each image has a lower error with its right caption than with the other; `None` if there are no pairs.
    pub text: Option<Proportion>,
    /// Each caption has a lower error with its right image than with the other.
    pub image: Option<Proportion>,
    /// Both.
    pub group: Option<Proportion>,
    /// Pairs without scores.
    pub incomplete: u64,
    /// The first twenty of these, with the reasons.
    #[serde(skip)]
    pub problems: Vec<(String, String)>,
}

/// A share of pairs with its 95% interval (Wilson's, which also holds for few pairs and for shares of 0 or 1).
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Proportion {
    /// The share, in [0, 1].
    pub score: f64,
    /// Half the width of its interval.
    pub interval: f64,
    /// Lower end of the interval.
    pub low: f64,
    /// Upper end of the interval.
    pub high: f64,
}

impl Proportion {
    fn new(right: u64, n: u64) -> Option<Self> {
        let (low, high) = wilson(right, n);
        (n > 0).then(|| Self { score: right as f64 / n as f64, interval: (high - low) / 2.0, low, high })
    }
}

/// One image of a pair.
#[derive(Clone, Debug)]
struct Half {
    key: String,
    captions: Vec<String>,
    right: Option<usize>,
    /// The score of each caption; `None` if the image has no prediction.
    scores: Option<Vec<Score>>,
}

impl Half {
    fn new(sample: &Sample, prediction: Option<&Prediction>) -> Self {
        let classes = Classes::of_captions(&sample.candidates);
        let right = sample.label.as_deref().and_then(|label| classes.with_label(label));
        let of = |caption: ClassIndex, scores: &[Score]| scores.iter().find(|s| s.class == caption).copied();
        // An image whose class is uncertain still has scores.
        let scores = prediction.map(Prediction::scores).filter(|scores| !scores.is_empty()).and_then(|scores| {
            (0..).zip(&sample.candidates).map(|(caption, _)| of(ClassIndex(caption), scores)).collect()
        });
        Self {
            key: sample.key.clone(),
            captions: sample.candidates.clone(),
            right: right.and_then(|class| usize::try_from(class.0).ok()),
            scores,
        }
    }
}

/// Which of its scores a pair earns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct PairResult {
    text: bool,
    image: bool,
}

/// The state of a pair.
#[derive(Clone, Debug)]
enum Pair {
    /// Only one image has been seen.
    Waiting(Box<Half>),
    /// Both images have been seen and scored; their captions and scores are no longer needed.
    Judged(Result<PairResult, String>),
    /// More than two images.
    Crowd(usize),
}

/// The pairs seen so far.
#[derive(Clone, Debug, Default)]
pub(super) struct Pairs(BTreeMap<String, Pair>);

impl Pairs {
    /// Adds an image if it belongs to a pair.
    pub(super) fn add(&mut self, sample: &Sample, prediction: Option<&Prediction>) {
        let Some(name) = &sample.pair else { return };
        let half = Half::new(sample, prediction);
        let pair = match self.0.remove(name) {
            None => Pair::Waiting(Box::new(half)),
            Some(Pair::Waiting(first)) => Pair::Judged(judge(&first, &half)),
            Some(Pair::Judged(_)) => Pair::Crowd(3),
            Some(Pair::Crowd(images)) => Pair::Crowd(images + 1),
        };
        self.0.insert(name.clone(), pair);
    }

    /// The scores; `None` if there were no pairs.
    pub(super) fn finish(self) -> Option<PairScores> {
        if self.0.is_empty() {
            return None;
        }
        let (mut n, mut text, mut image, mut group, mut problems) = (0, 0, 0, 0, Vec::new());
        for (name, pair) in self.0 {
            let result = match pair {
                Pair::Judged(result) => result,
                Pair::Waiting(_) => Err("it has 1 images, not 2".into()),
                Pair::Crowd(images) => Err(format!("it has {images} images, not 2")),
            };
            match result {
                Ok(result) => {
                    n += 1;
                    text += u64::from(result.text);
                    image += u64::from(result.image);
                    group += u64::from(result.text && result.image);
                }
                Err(problem) => problems.push((name, problem)),
            }
        }
        let incomplete = problems.len() as u64;
        problems.truncate(INCOMPLETE_SHOWN);
        let [text, image, group] = [text, image, group].map(|right| Proportion::new(right, n));
        Some(PairScores { n, text, image, group, incomplete, problems })
    }
}

/// Compares the two images of a pair. Ties count as wrong.
fn judge(a: &Half, b: &Half) -> Result<PairResult, String> {
    if a.captions != b.captions || a.captions.len() != 2 {
        return Err(format!("{} and {} do not have the same two captions in the same order", a.key, b.key));
    }
    let right =
        |half: &Half| half.right.ok_or_else(|| format!("{} has no label that is one of its captions", half.key));
    let (of_a, of_b) = (right(a)?, right(b)?);
    if of_a == of_b {
        return Err(format!("{} and {} have the same right caption", a.key, b.key));
    }
    let scores = |half: &Half| half.scores.clone().ok_or_else(|| format!("{} has no prediction", half.key));
    let (a, b) = (scores(a)?, scores(b)?);
    if a.iter().chain(&b).any(|score| score.n != a[0].n) {
        return Err("its captions were not scored on the same slots (--policy exhaustive eliminates none)".into());
    }
    let lower = |one: Score, other: Score| one.mean_error < other.mean_error;
    Ok(PairResult {
        text: lower(a[of_a], a[of_b]) && lower(b[of_b], b[of_a]),
        image: lower(a[of_a], b[of_a]) && lower(b[of_b], a[of_b]),
    })
}

impl fmt::Display for PairScores {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} pairs of images with the same captions, 95% intervals", self.n)?;
        for (name, share) in [("text score", self.text), ("image score", self.image), ("group score", self.group)] {
            if let Some(share) = share {
                let [score, low, high] = [share.score, share.low, share.high].map(|share| share * 100.0);
                writeln!(f, "  {name:<14} {score:6.2} % ({low:.2} to {high:.2} %)")?;
            }
        }
        if self.incomplete > 0 {
            writeln!(f, "  {} pairs have no scores", self.incomplete)?;
            self.problems.iter().try_for_each(|(pair, problem)| writeln!(f, "    {pair}: {problem}"))?;
            let more = self.incomplete - self.problems.len() as u64;
            if more > 0 {
                writeln!(f, "    and {more} more")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use elbo_core::ids::{Round, SampleId};
    use elbo_core::prediction::{Labelled, Outcome};

    fn sample(pair: &str, key: &str, label: Option<&str>) -> Sample {
        Sample {
            id: SampleId(0),
            key: key.into(),
            location: format!("/{key}"),
            part: None,
            size: 1,
            etag: None,
            label: label.map(str::to_owned),
            candidates: vec!["cat on mat".into(), "mat on cat".into()],
            pair: Some(pair.into()),
        }
    }

    /// A prediction with the mean errors of the captions 0 and 1.
    fn prediction(sample: &Sample, errors: [f32; 2]) -> Prediction {
        let score = |(class, mean_error)| Score {
            class: ClassIndex(class),
            mean_error,
            std_error: None,
            n: 9,
            round: Round(0),
        };
        let mut scores: Vec<_> = (0..).zip(errors).map(score).collect();
        scores.sort_by(|a, b| a.mean_error.total_cmp(&b.mean_error));
        let class = scores[0].class;
        let labelled = Labelled { class, class_name: String::new(), confidence: None, margin: None, scores };
        Prediction {
            sample: sample.id,
            key: sample.key.clone(),
            label: sample.label.clone(),
            evaluations: 18,
            outcome: Outcome::Labelled(labelled),
        }
    }

    fn add(pairs: &mut Pairs, pair: &str, a: [f32; 2], b: [f32; 2]) {
        // A label is either a text or a position.
        for (key, label, errors) in [("a", "cat on mat", a), ("b", "1", b)] {
            let sample = sample(pair, key, Some(label));
            pairs.add(&sample, Some(&prediction(&sample, errors)));
        }
    }

    #[test]
    fn scores_match_those_worked_out_by_hand() {
        let mut pairs = Pairs::default();
        // [image a: caption 0 (right), caption 1], [image b: caption 0, caption 1 (right)].
        add(&mut pairs, "both", [1.0, 2.0], [2.0, 1.0]);
        // Image b has low errors throughout: both images pick their captions, but caption 0 picks the wrong image.
        add(&mut pairs, "text only", [5.0, 6.0], [2.0, 1.0]);
        // Caption 1 has high errors throughout: captions pick their images, but image b picks the wrong caption.
        add(&mut pairs, "image only", [1.0, 8.0], [2.0, 7.0]);
        add(&mut pairs, "neither", [2.0, 1.0], [1.0, 2.0]);
        add(&mut pairs, "tie", [1.0, 1.0], [1.0, 1.0]);
        let scores = pairs.finish().unwrap();
        let json = serde_json::to_value(&scores).unwrap();
        assert_eq!((json["n"].as_u64(), json["incomplete"].as_u64()), (Some(5), Some(0)));
        // Wilson's intervals, by his formula in Python with the normal quantile 1.959963984540054: 2 of 5 is 0.117620774 to
        // 0.769275719, 1 of 5 is 0.036224109 to 0.624465370. Wald's would be -0.0294 to 0.8294 and -0.1506 to 0.5506.
        let two = (0.4, 0.117_620_774, 0.769_275_719);
        for (name, (p, low, high)) in [("text", two), ("image", two), ("group", (0.2, 0.036_224_109, 0.624_465_370))] {
            assert_eq!(json[name]["score"], p);
            for (of, expected) in [("low", low), ("high", high), ("interval", (high - low) / 2.0)] {
                assert!((json[name][of].as_f64().unwrap() - expected).abs() < 1e-7, "{name} {of}: {json}");
            }
        }
        assert!(scores.to_string().contains("group score     20.00 % (3.62 to 62.45 %)"), "{scores}");
    }

    #[test]
    fn pairs_that_cannot_be_scored_are_counted_and_named() {
        let mut pairs = Pairs::default();
        add(&mut pairs, "good", [1.0, 2.0], [2.0, 1.0]);
        let lone = sample("lone", "l", Some("0"));
        pairs.add(&lone, Some(&prediction(&lone, [1.0, 2.0])));
        let mut two = |pair: &str, change: fn(&mut Sample, &mut Option<Prediction>)| {
            for (key, label) in [("x", "0"), ("y", "1")] {
                let mut sample = sample(pair, key, Some(label));
                let mut row = Some(prediction(&sample, [1.0, 2.0]));
                if key == "y" {
                    change(&mut sample, &mut row);
                }
                pairs.add(&sample, row.as_ref());
            }
        };
        for _ in 0..2 {
            two("crowd", |_, _| ());
        }
        two("unlabelled", |sample, _| sample.label = None);
        two("same", |sample, _| sample.label = Some("0".into()));
        two("order", |sample, _| sample.candidates.reverse());
        two("bad", |_, row| row.as_mut().unwrap().outcome = Outcome::Quarantined { error: "x".into() });
        two("open", |_, row| *row = None);
        two("slots", |_, row| {
            if let Outcome::Labelled(labelled) = &mut row.as_mut().unwrap().outcome {
                labelled.scores[1].n = 3;
            }
        });
        let scores = pairs.finish().unwrap();
        assert_eq!((scores.n, scores.incomplete), (1, 8));
        // A single right pair says little: the same formula gives 0.206549314 to 1.
        let share = scores.text.unwrap();
        assert_eq!(share.score, 1.0);
        assert!((share.low - 0.206_549_314).abs() < 1e-7 && (share.high - 1.0).abs() < 1e-12, "{share:?}");
        let text = scores.to_string();
        for problem in [
            "lone: it has 1 images, not 2",
            "crowd: it has 4 images, not 2",
            "unlabelled: y has no label",
            "same: x and y have the same right caption",
            "order: x and y do not have the same two captions",
            "bad: y has no prediction",
            "open: y has no prediction",
            "slots: its captions were not scored on the same slots",
        ] {
            assert!(text.contains(problem), "{problem} is not in {text}");
        }
    }

    #[test]
    fn without_pairs_there_are_no_scores() {
        let mut pairs = Pairs::default();
        pairs.add(&Sample { pair: None, ..sample("", "a", Some("0")) }, None);
        assert_eq!(pairs.finish(), None);
    }
}
