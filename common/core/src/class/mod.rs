//! Classes and their prompts, read from the file the user gives.

mod file;
mod hierarchy;
mod labels;

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use self::hierarchy::{Group, HIERARCHY, Hierarchy, HierarchyError};
pub use self::labels::{CLASS_MAP, ModelLabels};

use self::file::{ClassReader, KnownBy};
use crate::hand_table::{HandError, HandText};
use crate::ids::{ClassIndex, PromptIndex};
use crate::text::normal;

/// The template used if the class file has no prompts and the job no templates.
pub const DEFAULT_TEMPLATE: &str = "a photo of a {}";

/// One prompt of one class.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prompt {
    /// The text given to the text encoder.
    pub text: String,
    /// The class it belongs to.
    pub class: ClassIndex,
    /// The label that a class-conditional model uses for it, if that is not the class index.
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

/// Invalid classes.
#[derive(Debug, thiserror::Error)]
pub enum ClassError {
    /// The class file or class map is wrong.
    #[error(transparent)]
    File(#[from] HandError),
    /// A configuration file of the model could not be read.
    #[error("reading {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The reason.
        source: std::io::Error,
    },
    /// A configuration file of the model is not the expected JSON.
    #[error("reading {path}: {source}")]
    Json {
        /// The file.
        path: PathBuf,
        /// The reason.
        source: serde_json::Error,
    },
    /// A template without a place for the class name.
    #[error("the template '{0}' has no {{}}: put {{}} where the class name belongs")]
    Template(String),
}

/// How errors name a class file.
pub const CLASS_FILE: &str = "the class file";

impl Classes {
    /// Reads a class file: a table whose header names `classname` (and `prompt`, `classidx`), a JSON list of names, or one
    /// class per line. Classes that share a name or prompt, and so can't be told apart, are refused.
    pub fn of_text(text: &HandText, templates: &[String]) -> Result<Self, ClassError> {
        Ok(ClassReader::new(text, KnownBy::Prompts).read(templates)?.classes)
    }

    /// Reads the text of a class file. `templates` may be empty: rows without a prompt then use [`DEFAULT_TEMPLATE`].
    ///
    /// ```
    /// use elbo_core::class::Classes;
    ///
    /// let classes = Classes::parse("ant\nbee\n", &["a drawing of a {}".to_owned()])?;
    /// assert_eq!(classes.prompts[1].text, "a drawing of a bee");
    /// # Ok::<_, elbo_core::class::ClassError>(())
    /// ```
    pub fn parse(text: &str, templates: &[String]) -> Result<Self, ClassError> {
        Self::of_text(&HandText::new(CLASS_FILE, "in memory", text.into())?, templates)
    }

    /// The prompts' texts, in order.
    pub fn texts(&self) -> Vec<String> {
        self.prompts.iter().map(|prompt| prompt.text.clone()).collect()
    }

    /// The labels by which a class-conditional model knows the prompts, in order.
    pub fn labels(&self) -> Vec<i32> {
        self.prompts.iter().map(|prompt| prompt.label.unwrap_or(prompt.class.0)).collect()
    }

    /// The classes of a sample with its own captions: each caption is a class, and its position is the class index.
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

    /// The class that a label means: the one with this name, in any Unicode form, or else the one with this index.
    pub fn with_label(&self, label: &str) -> Option<ClassIndex> {
        let those =
            |same: &dyn Fn(&str) -> bool| self.names.iter().find(|(_, name)| same(name)).map(|(index, _)| *index);
        let normalised = || {
            let label = (!label.is_ascii()).then(|| normal(label))?;
            those(&|name| !name.is_ascii() && normal(name) == label)
        };
        let named = those(&|name| name == label).or_else(normalised);
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
    fn a_label_matches_a_class_name_in_any_unicode_form() {
        let classes = Classes::parse("caf\u{e9}\ntea\nthe\u{301}", &[]).unwrap();
        assert_eq!(classes.with_label("cafe\u{301}"), Some(ClassIndex(0)));
        assert_eq!(classes.with_label("th\u{e9}"), Some(ClassIndex(2)));
        let captions = Classes::of_captions(&["tea".to_owned(), "cafe\u{301}".to_owned()]);
        assert_eq!(captions.with_label("caf\u{e9}"), Some(ClassIndex(1)));
        assert_eq!(classes.with_label("cafe"), None);
    }

    #[test]
    fn templates_make_the_prompts_of_every_class() {
        let templates = ["a {}".to_owned(), "the {}".to_owned()];
        let classes = Classes::parse("cat\ndog", &templates).unwrap();
        assert_eq!(texts(&classes), [("a cat", 0), ("the cat", 0), ("a dog", 1), ("the dog", 1)]);
    }

    #[test]
    fn errors_in_class_files_name_the_problem_and_the_place() {
        let error = |text: &str| Classes::parse(text, &[]).unwrap_err().to_string();
        assert!(error("").contains("no class"));
        assert!(error("prompt,classname,classidx\n").contains("no class"));
        assert!(error("prompt,classname,classidx\na,cat,x\n").contains("line 2: classidx 'x'"));
        assert!(error("prompt,classname,classidx\na,cat,1\nb,dog,1\n").contains("line 3: class 1 is 'dog' here"));
        assert!(error("prompt,classname,classidx\na,,1\n").contains("class name is empty"));
        assert!(Classes::parse("cat", &["a".into()]).unwrap_err().to_string().contains("has no {}"));
    }
}
