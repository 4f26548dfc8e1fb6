//! Labels by key, from a table written by hand.

use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};

use elbo_core::text::{excerpt, normal};

use super::LabelError;

/// The columns in its header.
const COLUMNS: &str = "key,label";

/// A label file, and which of its rows match images. Keys are compared in Unicode's normal form C.
#[derive(Debug)]
pub(crate) struct LabelFile {
    path: PathBuf,
    /// By key in normal form.
    rows: HashMap<String, Row>,
    unnamed_images: Unmatched,
    /// The first row that matches two images, and the second image.
    conflict: Option<(String, String)>,
}

#[derive(Debug)]
struct Row {
    line: u64,
    /// The key as written.
    key: String,
    label: Option<String>,
    image: Option<Image>,
}

/// The image that a row matches.
#[derive(Debug)]
enum Image {
    /// Its key is written as in the row. Most are, and their key is stored once.
    AsWritten,
    /// Its key is written differently.
    Named(String),
}

impl Row {
    /// The key of the image that it matches.
    fn image(&self) -> Option<&str> {
        self.image.as_ref().map(|image| match image {
            Image::AsWritten => self.key.as_str(),
            Image::Named(key) => key,
        })
    }
}

/// The number of unmatched items, and the first few.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Unmatched {
    /// How many.
    pub(crate) count: u64,
    /// Up to three of them.
    pub(crate) examples: Vec<String>,
}

impl Unmatched {
    /// Maximum number of examples.
    const KEPT: usize = 3;

    fn note(&mut self, example: &str) {
        self.count += 1;
        if self.examples.len() < Self::KEPT {
            self.examples.push(example.to_owned());
        }
    }
}

/// Shows the examples.
impl fmt::Display for Unmatched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown: Vec<_> = self.examples.iter().map(|example| format!("'{}'", excerpt(example))).collect();
        f.write_str(&shown.join(", "))
    }
}

/// A key without a leading `./`.
fn bare(key: &str) -> &str {
    key.trim_start_matches("./")
}

impl LabelFile {
    pub(super) fn read(path: &Path) -> Result<Self, LabelError> {
        let text = crate::given::text("the label file", path)?;
        let table = text.table(|header| header.has("key") && header.has("label"))?.ok_or_else(|| {
            text.wrong(format!("its first line must name the columns {COLUMNS}, and names {}", text.shown_header()))
        })?;
        let (key_column, label_column) = (table.required("key", COLUMNS)?, table.required("label", COLUMNS)?);
        let mut rows: HashMap<String, Row> = HashMap::new();
        for row in table.whole_rows() {
            let row = row?;
            let wrong = |problem: String| text.wrong_in(row.line, problem);
            let (key, label) = (bare(row.cell(key_column)), row.filled(Some(label_column)));
            if key.is_empty() {
                return Err(
                    wrong("the key is empty: write the path of an image, relative to --images".to_owned()).into()
                );
            }
            let label = label.map(|label| normal(label).into_owned());
            let Some(first) = rows.get_mut(normal(key).as_ref()) else {
                let (line, key) = (row.line, key.to_owned());
                rows.insert(normal(&key).into_owned(), Row { line, key, label, image: None });
                continue;
            };
            if first.key != key {
                return Err(wrong(format!(
                    "the key '{}' and '{}' in line {} differ only in their Unicode forms: keep one of the rows",
                    excerpt(key),
                    excerpt(&first.key),
                    first.line
                ))
                .into());
            }
            match (&first.label, label) {
                (Some(one), Some(other)) if *one != other => {
                    let (key, one, other) = (excerpt(key), excerpt(one), excerpt(&other));
                    let problem = format!(
                        "'{key}' is labelled '{other}' here and '{one}' in line {}: give each key one label",
                        first.line
                    );
                    return Err(wrong(problem).into());
                }
                (None, label) => first.label = label,
                _ => {}
            }
        }
        Ok(Self { path: path.to_owned(), rows, unnamed_images: Unmatched::default(), conflict: None })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The label of an image; `None` if its row also matches another image, which [`Self::check_rows`] reports.
    pub(super) fn of(&mut self, key: &str) -> Option<String> {
        let normal = normal(bare(key));
        let Some(row) = self.rows.get_mut(normal.as_ref()) else {
            self.unnamed_images.note(key);
            return None;
        };
        match row.image() {
            None if row.key == key => row.image = Some(Image::AsWritten),
            None => row.image = Some(Image::Named(key.to_owned())),
            Some(first) if first == key => {}
            Some(_) => {
                self.conflict.get_or_insert_with(|| (normal.into_owned(), key.to_owned()));
                return None;
            }
        }
        row.label.clone()
    }

    pub(super) fn unmatched_rows(&self) -> Unmatched {
        let mut rows: Vec<_> = self.rows.values().filter(|row| row.image.is_none()).collect();
        rows.sort_unstable_by_key(|row| row.line);
        let mut unmatched = Unmatched::default();
        rows.into_iter().for_each(|row| unmatched.note(&row.key));
        unmatched
    }

    pub(super) fn unnamed_images(&self) -> &Unmatched {
        &self.unnamed_images
    }

    pub(super) fn clear(&mut self) {
        self.rows.values_mut().for_each(|row| row.image = None);
        (self.unnamed_images, self.conflict) = (Unmatched::default(), None);
    }

    /// Fails if a row matches two images.
    pub(super) fn check_rows(&self) -> Result<(), LabelError> {
        let path = self.path.clone();
        if let Some((key, second)) = &self.conflict
            && let Some(row) = self.rows.get(key)
        {
            let first = row.image().unwrap_or_default().to_owned();
            return Err(LabelError::TwoImages { path, line: row.line, first, second: second.clone() });
        }
        Ok(())
    }

    /// Fails if no row matches any of the dataset's images, of which `example` is one.
    pub(super) fn check_match(&self, example: &str) -> Result<(), LabelError> {
        if self.rows.values().any(|row| row.image.is_some()) {
            return Ok(());
        }
        Err(LabelError::NoMatch { path: self.path.clone(), example: example.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::super::{LabelSource, Labels};
    use super::*;

    /// `Übung_é_0.png` as macOS writes it, and as other systems do.
    const DECOMPOSED: &str = "U\u{308}bung_e\u{301}_0.png";
    const COMPOSED: &str = "\u{dc}bung_\u{e9}_0.png";

    fn read(text: impl AsRef<[u8]>) -> Result<Labels, String> {
        let root = tempfile::TempDir::new().unwrap();
        let path = root.path().join("labels.csv");
        std::fs::write(&path, text).unwrap();
        LabelSource::File(path).open().map(Option::unwrap).map_err(|error| error.to_string())
    }

    #[test]
    fn keys_match_in_any_unicode_form_and_unmatched_ones_are_counted() {
        let mut labels = read(format!("key,label\n{COMPOSED},zero\nb.png,one\nc.png,two\n")).unwrap();
        let found = ["C.PNG", DECOMPOSED, "./b.png"].map(|key| labels.of(key));
        assert_eq!(found.each_ref().map(Option::as_deref), [None, Some("zero"), Some("one")]);
        let one = |example: &str| Unmatched { count: 1, examples: vec![example.to_owned()] };
        assert_eq!((labels.unmatched_rows(), labels.unnamed_images()), (one("c.png"), one("C.PNG")));
        labels.check_used("C.PNG").unwrap();
        // After a restart, nothing is counted twice.
        labels.clear();
        assert_eq!((labels.of("x"), labels.unnamed_images(), labels.unmatched_rows().count), (None, one("x"), 3));
        assert!(labels.check_used("x").unwrap_err().to_string().contains("like 'x'"));
    }

    #[test]
    fn three_examples_are_kept_in_the_order_of_the_file() {
        let rows: String = (0..9).map(|i| format!("{}.png,cat\n", 9 - i)).collect();
        let labels = read(format!("key,label\n{rows}")).unwrap();
        let unmatched = labels.unmatched_rows();
        assert_eq!((unmatched.count, unmatched.to_string()), (9, "'9.png', '8.png', '7.png'".to_owned()));
    }

    #[test]
    fn keys_with_the_same_normal_form_are_refused_with_both_names() {
        let error = read(format!("key,label\n{COMPOSED},zero\n{DECOMPOSED},zero\n")).unwrap_err();
        assert!(error.contains("labels.csv, line 3: ") && error.contains("in line 2 differ only in"), "{error}");
        assert!(error.contains(COMPOSED) && error.contains(DECOMPOSED), "{error}");
        let mut labels = read(format!("key,label\n{COMPOSED},zero\n")).unwrap();
        assert_eq!((labels.of(COMPOSED).as_deref(), labels.of(DECOMPOSED)), (Some("zero"), None));
        let error = labels.check_rows().unwrap_err().to_string();
        assert!(error.contains("line 2") && error.contains(COMPOSED) && error.contains(DECOMPOSED), "{error}");
    }

    #[test]
    fn labels_are_in_normal_form_and_may_be_left_empty() {
        let mut labels = read("Label;Key\ncafe\u{301};./a.png\n;b.png\n;a.png\n").unwrap();
        assert_eq!([labels.of("a.png"), labels.of("b.png")], [Some("caf\u{e9}".to_owned()), None]);
        assert_eq!(labels.unnamed_images().count, 0);
        assert_eq!(Labels::Parent.of("x/cafe\u{301}/1.png").as_deref(), Some("caf\u{e9}"));
    }

    #[test]
    fn wrong_files_say_where_and_what_to_do() {
        for (text, problem) in [
            (
                &b"name;label\na;b\n"[..],
                "labels.csv: its first line must name the columns key,label, and names name, label",
            ),
            (
                b"key,label\r\na.png,cat\r\n\r\na.png,dog\r\n",
                "line 4: 'a.png' is labelled 'dog' here and 'cat' in line 2",
            ),
            (b"key,label\na.png,cat\nb.pn", "line 3: it has 1 field"),
            (b"key,label\n./,cat\n", "line 2: the key is empty"),
            (b"key,label\na.png,caf\xe9\n", "line 2: it is not UTF-8 but perhaps Latin-1: save it as UTF-8"),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.contains(problem), "{error}");
        }
    }
}
