//! Which classes are taken for which.

use std::collections::BTreeMap;
use std::fmt;

use crate::class::Classes;
use crate::ids::ClassIndex;

/// Classes up to which the whole matrix is rendered.
const TABLE_CLASSES: usize = 30;

/// Confusions listed where there are more classes.
const PAIRS_SHOWN: usize = 20;

/// Counts by true and predicted class. Sparse: of a thousand classes' million pairs, few occur.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Confusion {
    names: BTreeMap<ClassIndex, String>,
    counts: BTreeMap<(ClassIndex, ClassIndex), u64>,
}

impl Confusion {
    /// An empty matrix of these classes.
    pub fn new(classes: &Classes) -> Self {
        Self { names: classes.names.clone(), counts: BTreeMap::new() }
    }

    /// Counts one sample.
    pub fn add(&mut self, truth: ClassIndex, predicted: ClassIndex) {
        *self.counts.entry((truth, predicted)).or_default() += 1;
    }

    /// How many samples of class `truth` were taken for `predicted`.
    pub fn count(&self, truth: ClassIndex, predicted: ClassIndex) -> u64 {
        self.counts.get(&(truth, predicted)).copied().unwrap_or_default()
    }

    /// How many samples were counted.
    pub fn total(&self) -> u64 {
        self.counts.values().sum()
    }

    /// How many of them were predicted right.
    pub fn right(&self) -> u64 {
        self.counts.iter().filter(|((truth, predicted), _)| truth == predicted).map(|(_, count)| count).sum()
    }

    /// The share of right predictions of each class that occurs, averaged over these classes; 0 where nothing was counted.
    pub fn mean_recall(&self) -> f64 {
        let mut of_class: BTreeMap<ClassIndex, (u64, u64)> = BTreeMap::new();
        for ((truth, predicted), count) in &self.counts {
            let (right, total) = of_class.entry(*truth).or_default();
            *total += count;
            *right += if truth == predicted { *count } else { 0 };
        }
        let recalls: f64 = of_class.values().map(|(right, total)| *right as f64 / *total as f64).sum();
        recalls / of_class.len().max(1) as f64
    }

    /// The confusions (true class, predicted class, count), most frequent first, equally frequent ones by class index.
    pub fn most_frequent(&self, n: usize) -> Vec<(ClassIndex, ClassIndex, u64)> {
        let wrong = self.counts.iter().filter(|((truth, predicted), _)| truth != predicted);
        let mut pairs: Vec<_> = wrong.map(|(&(truth, predicted), &count)| (truth, predicted, count)).collect();
        pairs.sort_by_key(|(.., count)| std::cmp::Reverse(*count));
        pairs.truncate(n);
        pairs
    }

    /// Whether the classes have no names, since every sample has its own.
    pub(super) fn is_nameless(&self) -> bool {
        self.names.is_empty()
    }

    fn name(&self, class: ClassIndex) -> &str {
        self.names.get(&class).map_or("?", String::as_str)
    }

    /// Rows are true classes, columns predicted ones, headed by their indices: names are too long for columns.
    fn table(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let widest = |texts: &mut dyn Iterator<Item = String>| texts.map(|t| t.chars().count()).max().unwrap_or(0);
        let index = widest(&mut self.names.keys().map(ToString::to_string));
        let name = widest(&mut self.names.values().cloned());
        let count = widest(&mut self.counts.values().map(ToString::to_string)).max(index);
        writeln!(f, "confusion (rows: label, columns: predicted, by class index)")?;
        write!(f, "  {:name$} {:index$}", "", "")?;
        self.names.keys().try_for_each(|class| write!(f, " {:>count$}", class.0))?;
        writeln!(f)?;
        for (truth, label) in &self.names {
            write!(f, "  {label:name$} {:>index$}", truth.0)?;
            for predicted in self.names.keys() {
                match self.count(*truth, *predicted) {
                    0 => write!(f, " {:>count$}", ".")?,
                    n => write!(f, " {n:>count$}")?,
                }
            }
            writeln!(f)?;
        }
        Ok(())
    }

    fn pairs(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "most frequent confusions")?;
        for (truth, predicted, count) in self.most_frequent(PAIRS_SHOWN) {
            writeln!(f, "  {} -> {}: {count}", self.name(truth), self.name(predicted))?;
        }
        Ok(())
    }
}

impl fmt::Display for Confusion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.names.len() <= TABLE_CLASSES { self.table(f) } else { self.pairs(f) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_classes_are_an_aligned_table() {
        let classes = Classes::parse("classname,classidx\ncat,7\nhorse,10\n", &[]).unwrap();
        let mut confusion = Confusion::new(&classes);
        for _ in 0..120 {
            confusion.add(ClassIndex(7), ClassIndex(7));
        }
        confusion.add(ClassIndex(10), ClassIndex(7));
        let expected = concat!(
            "confusion (rows: label, columns: predicted, by class index)\n",
            "             7  10\n",
            "  cat    7 120   .\n",
            "  horse 10   1   .\n",
        );
        assert_eq!(confusion.to_string(), expected);
        assert_eq!((confusion.total(), confusion.right(), confusion.mean_recall()), (121, 120, 0.5));
    }

    #[test]
    fn many_classes_are_their_most_frequent_confusions() {
        let names: Vec<_> = (0..31).map(|i| format!("c{i}")).collect();
        let mut confusion = Confusion::new(&Classes::parse(&names.join("\n"), &[]).unwrap());
        for (truth, predicted) in [(1, 1), (1, 1), (1, 1), (2, 0), (5, 6), (5, 6)] {
            confusion.add(ClassIndex(truth), ClassIndex(predicted));
        }
        assert_eq!(confusion.to_string(), "most frequent confusions\n  c5 -> c6: 2\n  c2 -> c0: 1\n");
    }
}
