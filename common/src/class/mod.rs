//! Classes and their prompts, read from the file the user gives.

mod hierarchy;
mod labels;

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use self::hierarchy::{Group, Hierarchy, HierarchyError};
pub use self::labels::ModelLabels;

use crate::ids::{ClassIndex, PromptIndex};

/// The template of a class file without templates of its own.
pub const DEFAULT_TEMPLATE: &str = "a photo of a {}";

/// One prompt of one class.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prompt {
    /// The text given to the text encoder.
    pub text: String,
    /// The class it stands for.
    pub class: ClassIndex,
    /// The label a class-conditional model knows it by, where that is not the class index.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub label: Option<i32>,
}

/// The classes of a job and their prompts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Classes {
    /// Class names by class index; pairs in JSON, whose keys can't be numbers.
    #[serde(with = "pairs")]
    pub names: BTreeMap<ClassIndex, String>,
    /// Prompts in file order; a [`PromptIndex`] is a position here.
    pub prompts: Vec<Prompt>,
}

mod pairs {
    use std::collections::BTreeMap;

    use serde::{Deserialize, Deserializer, Serializer};

    use crate::ids::ClassIndex;

    pub(super) fn serialize<S: Serializer>(names: &BTreeMap<ClassIndex, String>, to: S) -> Result<S::Ok, S::Error> {
        to.collect_seq(names)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<BTreeMap<ClassIndex, String>, D::Error> {
        Ok(Vec::<(ClassIndex, String)>::deserialize(from)?.into_iter().collect())
    }
}

/// A class file that can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ClassError {
    /// The file could not be read.
    #[error("reading the class file {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// A row is wrong.
    #[error("class file, line {line}: {problem}")]
    Row {
        /// 1-based line.
        line: u64,
        /// What is wrong and what would be right.
        problem: String,
    },
    /// A configuration of the model is not the JSON that was expected.
    #[error("reading {path}: {source}")]
    Json {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: serde_json::Error,
    },
    /// A class the class-conditional model does not have.
    #[error(
        "class file{}: the model has no class {label}: use its labels 0 to {} (or names), or map them with --class-map",
        .line.map_or(String::new(), |line| format!(", line {line}")),
        .count.saturating_sub(1)
    )]
    NoLabel {
        /// 1-based line, where it is known.
        line: Option<u64>,
        /// As given.
        label: String,
        /// How many labels there are.
        count: u32,
    },
    /// The file holds no class.
    #[error(
        "the class file holds no class: write one class per line, or CSV with the columns prompt,classname,classidx"
    )]
    Empty,
    /// A template without a place for the class name.
    #[error("the template '{0}' has no {{}}: put {{}} where the class name belongs")]
    Template(String),
}

#[derive(Deserialize)]
struct Row {
    prompt: Option<String>,
    classname: String,
    classidx: Option<String>,
}

impl Classes {
    /// Reads a class file: CSV with a header naming `classname` (and `prompt`, `classidx`), else one class per line.
    pub fn read(path: &std::path::Path, templates: &[String]) -> Result<Self, ClassError> {
        let text = crate::files::read_given_to_string(path)
            .map_err(|source| ClassError::Read { path: path.to_owned(), source })?;
        Self::parse(&text, templates)
    }

    /// Reads the text of a class file. `templates` may be empty: rows without a prompt then use [`DEFAULT_TEMPLATE`].
    pub fn parse(text: &str, templates: &[String]) -> Result<Self, ClassError> {
        if let Some(bad) = templates.iter().find(|t| !t.contains("{}")) {
            return Err(ClassError::Template(bad.clone()));
        }
        let text = text.trim_start_matches('\u{feff}');
        let header = text.lines().next().unwrap_or_default();
        let is_csv = header.split(',').any(|column| column.trim() == "classname");
        let mut classes = Self::default();
        if is_csv {
            classes.read_csv(text, templates)?;
        } else {
            for (i, name) in text.lines().map(str::trim).filter(|l| !l.is_empty()).enumerate() {
                classes.push(i as u64 + 1, ClassIndex(i as i32), name, None, templates)?;
            }
        }
        if classes.prompts.is_empty() { Err(ClassError::Empty) } else { Ok(classes) }
    }

    fn read_csv(&mut self, text: &str, templates: &[String]) -> Result<(), ClassError> {
        let mut reader = csv::ReaderBuilder::new().trim(csv::Trim::All).flexible(true).from_reader(text.as_bytes());
        for (position, row) in (0i32..).zip(reader.deserialize::<Row>()) {
            let row = row.map_err(|e| ClassError::Row {
                line: e.position().map_or(0, csv::Position::line),
                problem: format!("{e}; the columns are prompt,classname,classidx"),
            })?;
            let line = position as u64 + 2;
            let index = match row.classidx.as_deref() {
                None | Some("") => position,
                Some(text) => text.parse().map_err(|_| ClassError::Row {
                    line,
                    problem: format!("classidx '{text}' is not a whole number"),
                })?,
            };
            let prompt = row.prompt.as_deref().filter(|p| !p.is_empty());
            self.push(line, ClassIndex(index), &row.classname, prompt, templates)?;
        }
        Ok(())
    }

    fn push(
        &mut self,
        line: u64,
        index: ClassIndex,
        name: &str,
        prompt: Option<&str>,
        templates: &[String],
    ) -> Result<(), ClassError> {
        self.name_class(line, index, name)?;
        if templates.is_empty() {
            let text = prompt.map_or_else(|| DEFAULT_TEMPLATE.replace("{}", name), str::to_owned);
            self.prompts.push(Prompt { text, class: index, label: None });
        } else {
            // Templates speak about class names, so they replace the file's own prompts.
            for template in templates {
                let prompt = Prompt { text: template.replace("{}", name), class: index, label: None };
                if !self.prompts.contains(&prompt) {
                    self.prompts.push(prompt);
                }
            }
        }
        Ok(())
    }

    /// Notes a class' name, which must not differ from an earlier row's.
    fn name_class(&mut self, line: u64, index: ClassIndex, name: &str) -> Result<(), ClassError> {
        if name.is_empty() {
            return Err(ClassError::Row { line, problem: "the class name is empty".into() });
        }
        match self.names.get(&index) {
            Some(other) if other != name => {
                let problem =
                    format!("class {index} is '{name}' here and '{other}' above: give each class its own classidx");
                Err(ClassError::Row { line, problem })
            }
            _ => {
                self.names.insert(index, name.to_owned());
                Ok(())
            }
        }
    }

    /// The classes of a sample with captions of its own: a caption is a class, and its index its position.
    pub fn of_captions(captions: &[String]) -> Self {
        let of = |(index, caption): (i32, &String)| (ClassIndex(index), caption.clone());
        let prompt = |(class, text)| Prompt { text, class, label: None };
        Self {
            names: (0..).zip(captions).map(of).collect(),
            prompts: (0..).zip(captions).map(of).map(prompt).collect(),
        }
    }

    /// The class of a prompt.
    pub fn class_of(&self, prompt: PromptIndex) -> ClassIndex {
        self.prompts[prompt.at()].class
    }

    /// The name of a class.
    pub fn name(&self, class: ClassIndex) -> &str {
        self.names.get(&class).map_or("", String::as_str)
    }

    /// The classes a label means: those named so, or the one whose index it is where none is named so.
    pub fn with_label(&self, label: &str) -> Option<ClassIndex> {
        let named = self.names.iter().find(|(_, name)| *name == label).map(|(index, _)| *index);
        named.or_else(|| label.parse().ok().map(ClassIndex).filter(|index| self.names.contains_key(index)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(classes: &Classes) -> Vec<(&str, i32)> {
        classes.prompts.iter().map(|p| (p.text.as_str(), p.class.0)).collect()
    }

    #[test]
    fn a_plain_list_numbers_classes_by_line() {
        let classes = Classes::parse("cat\n\n dog \n", &[]).unwrap();
        assert_eq!(texts(&classes), [("a photo of a cat", 0), ("a photo of a dog", 1)]);
    }

    #[test]
    fn rows_with_one_classidx_are_one_class_with_several_prompts() {
        let csv = "prompt,classname,classidx\n\"a cat, sitting\",cat,7\na kitten,cat,7\na dog,dog,2\n";
        let classes = Classes::parse(csv, &[]).unwrap();
        assert_eq!(texts(&classes), [("a cat, sitting", 7), ("a kitten", 7), ("a dog", 2)]);
        assert_eq!(classes.names.len(), 2);
        assert_eq!(classes.with_label("cat"), Some(ClassIndex(7)));
        assert_eq!(classes.with_label("2"), Some(ClassIndex(2)));
        assert_eq!(classes.with_label("bird"), None);
    }

    #[test]
    fn templates_make_the_prompts_of_every_class() {
        let templates = ["a {}".to_owned(), "the {}".to_owned()];
        let classes = Classes::parse("cat\ndog", &templates).unwrap();
        assert_eq!(texts(&classes), [("a cat", 0), ("the cat", 0), ("a dog", 1), ("the dog", 1)]);
    }

    #[test]
    fn wrong_files_say_what_is_wrong_and_where() {
        let error = |text: &str| Classes::parse(text, &[]).unwrap_err().to_string();
        assert!(error("").contains("no class"));
        assert!(error("prompt,classname,classidx\n").contains("no class"));
        assert!(error("prompt,classname,classidx\na,cat,x\n").contains("line 2: classidx 'x'"));
        assert!(error("prompt,classname,classidx\na,cat,1\nb,dog,1\n").contains("line 3: class 1 is 'dog' here"));
        assert!(error("prompt,classname,classidx\na,,1\n").contains("class name is empty"));
        assert!(Classes::parse("cat", &["a".into()]).unwrap_err().to_string().contains("has no {}"));
    }
}
