//! Which classes are confused with which.

use std::collections::BTreeMap;
use std::fmt;

use elbo_core::class::Classes;
use elbo_core::ids::ClassIndex;

use super::text;

/// The most columns of a class name in the matrix.
const NAME: usize = 20;

/// The most confusions listed if the matrix is too wide.
const PAIRS_SHOWN: usize = 20;

/// The most classes listed in that case.
const CLASSES_SHOWN: usize = 10;

/// Counts by true and predicted class. Sparse: of the million pairs of a thousand classes, few occur.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Confusion {
    names: BTreeMap<ClassIndex, String>,
    counts: BTreeMap<(ClassIndex, ClassIndex), u64>,
}

impl Confusion {
    /// An empty matrix for these classes.
    pub fn new(classes: &Classes) -> Self {
        Self { names: classes.names.clone(), counts: BTreeMap::new() }
    }

    /// Counts one sample.
    pub fn add(&mut self, truth: ClassIndex, predicted: ClassIndex) {
        *self.counts.entry((truth, predicted)).or_default() += 1;
    }

    /// How many samples of class `truth` were predicted as `predicted`.
    pub fn count(&self, truth: ClassIndex, predicted: ClassIndex) -> u64 {
        self.counts.get(&(truth, predicted)).copied().unwrap_or_default()
    }

    /// How many samples were counted.
    pub fn total(&self) -> u64 {
        self.counts.values().sum()
    }

    /// How many of them were predicted correctly.
    pub fn right(&self) -> u64 {
        self.counts.iter().filter(|((truth, predicted), _)| truth == predicted).map(|(_, count)| count).sum()
    }

    /// The share of correct predictions of each class that occurs, averaged over these classes; 0 if nothing was counted.
    pub fn mean_recall(&self) -> f64 {
        let of_class = self.recalls();
        let recalls: f64 = of_class.values().map(|(right, total)| *right as f64 / *total as f64).sum();
        recalls / of_class.len().max(1) as f64
    }

    /// The confusions (true class, predicted class, count): most frequent first, ties by class index.
    pub fn most_frequent(&self, n: usize) -> Vec<(ClassIndex, ClassIndex, u64)> {
        let wrong = self.counts.iter().filter(|((truth, predicted), _)| truth != predicted);
        let mut pairs: Vec<_> = wrong.map(|(&(truth, predicted), &count)| (truth, predicted, count)).collect();
        pairs.sort_by_key(|(.., count)| std::cmp::Reverse(*count));
        pairs.truncate(n);
        pairs
    }

    /// Whether there are no class names, because every sample has its own classes.
    pub(super) fn is_nameless(&self) -> bool {
        self.names.is_empty()
    }

    fn name(&self, class: ClassIndex) -> &str {
        self.names.get(&class).map_or("?", String::as_str)
    }

    /// For each class that occurs, how many samples were predicted correctly, and how many there are.
    fn recalls(&self) -> BTreeMap<ClassIndex, (u64, u64)> {
        let mut of_class: BTreeMap<ClassIndex, (u64, u64)> = BTreeMap::new();
        for ((truth, predicted), count) in &self.counts {
            let (right, total) = of_class.entry(*truth).or_default();
            *total += count;
            *right += if truth == predicted { *count } else { 0 };
        }
        of_class
    }

    /// The matrix as text. Rows are true classes; columns are predicted ones, headed by their indices because names are too
    /// long. `None` if it is wider than a terminal.
    fn table(&self) -> Option<String> {
        use std::fmt::Write;
        let digits = |texts: &mut dyn Iterator<Item = String>| texts.map(|t| t.len()).max().unwrap_or(0);
        let index = digits(&mut self.names.keys().map(ToString::to_string));
        let count = digits(&mut self.counts.values().map(ToString::to_string)).max(index);
        let name = self.names.values().map(|name| text::width(name)).max().unwrap_or(0).min(NAME);
        if 2 + name + 1 + index + self.names.len() * (1 + count) > text::WIDTH {
            return None;
        }
        let mut table = format!("  {:name$} {:index$}", "", "");
        for class in self.names.keys() {
            let _ = write!(table, " {:>count$}", class.0);
        }
        for (truth, label) in &self.names {
            let _ = write!(table, "\n  {} {:>index$}", text::head(label, name), truth.0);
            for predicted in self.names.keys() {
                let _ = match self.count(*truth, *predicted) {
                    0 => write!(table, " {:>count$}", "."),
                    n => write!(table, " {n:>count$}"),
                };
            }
        }
        Some(table)
    }

    fn pairs(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let recalls = self.recalls();
        let frequent = self.most_frequent(PAIRS_SHOWN);
        if frequent.is_empty() {
            return writeln!(f, "no class was taken for another");
        }
        writeln!(f, "most frequent confusions (label, taken for, how often of how many)")?;
        for (truth, predicted, count) in frequent {
            let (label, other) = (text::head(self.name(truth), 29), text::head(self.name(predicted), 29));
            let total = recalls.get(&truth).map_or(0, |(_, total)| *total);
            writeln!(f, "  {label}  {other}  {count:>6} of {total}")?;
        }
        let mut worst: Vec<_> = recalls.into_iter().filter(|(_, (right, total))| right < total).collect();
        let share = |(right, total): (u64, u64)| right as f64 / total as f64;
        worst.sort_by(|(_, a), (_, b)| share(*a).total_cmp(&share(*b)).then(b.1.cmp(&a.1)));
        writeln!(f, "\nclasses recognised worst (of {} that were not always recognised)", worst.len())?;
        for (class, counts) in worst.into_iter().take(CLASSES_SHOWN) {
            let (right, total) = counts;
            writeln!(f, "  {}  {:6.2} %  {right} of {total}", text::head(self.name(class), 40), share(counts) * 100.0)?;
        }
        Ok(())
    }
}

impl fmt::Display for Confusion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.table() {
            Some(table) => writeln!(f, "confusion (rows: label, columns: predicted, by class index)\n{table}"),
            None => self.pairs(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_classes_give_an_aligned_table() {
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
    fn a_matrix_wider_than_a_terminal_is_replaced_by_the_most_frequent_confusions() {
        let names: Vec<_> = (0..1000).map(|i| format!("c{i}{}", ", a name that goes on".repeat(i % 9))).collect();
        let mut confusion = Confusion::new(&Classes::parse(&names.join("\n"), &[]).unwrap());
        for (truth, predicted) in [(1, 1), (1, 1), (1, 1), (2, 0), (5, 6), (5, 6), (5, 5)] {
            confusion.add(ClassIndex(truth), ClassIndex(predicted));
        }
        let text = confusion.to_string();
        let lines: Vec<_> = text.lines().map(str::trim_end).collect();
        let cells = |line: &str| line.split("  ").map(str::trim).filter(|c| !c.is_empty()).map(str::to_owned).collect();
        let cells: Vec<Vec<String>> = lines.iter().map(|line| cells(line)).collect();
        assert_eq!(cells[1][2], "2 of 3", "{text}");
        assert!(cells[1][0].starts_with("c5, a name") && cells[1][0].ends_with('…'), "{text}");
        assert_eq!(cells[2][1..], ["c0", "1 of 1"], "{text}");
        assert_eq!(lines[4], "classes recognised worst (of 2 that were not always recognised)");
        assert_eq!((cells[5][1].as_str(), cells[6][1].as_str()), ("0.00 %", "33.33 %"), "{text}");
        assert!(lines.iter().all(|line| text::width(line) <= text::WIDTH), "{text}");
    }

    #[test]
    fn thirty_short_names_with_large_counts_do_not_break_lines() {
        let names: Vec<_> = (0..30).map(|i| format!("class{i}")).collect();
        let mut confusion = Confusion::new(&Classes::parse(&names.join("\n"), &[]).unwrap());
        (0..1200).for_each(|_| confusion.add(ClassIndex(3), ClassIndex(4)));
        assert!(confusion.to_string().starts_with("most frequent confusions"));
        let right = Confusion::new(&Classes::parse(&names.join("\n"), &[]).unwrap());
        assert!(right.to_string().lines().all(|line| text::width(line) <= text::WIDTH));
    }
}
