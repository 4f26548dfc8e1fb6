//! The classes of a class-conditional model, which knows them by label instead of by prompt.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::{ClassError, Classes, Prompt};
use crate::ids::ClassIndex;
use crate::model_files::is_contrastive;

/// The labels a class-conditional model was trained on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelLabels {
    /// How many there are: 0 to `count - 1`.
    pub count: u32,
    /// Their names (`id2label`), where the model has them.
    pub names: BTreeMap<u32, String>,
}

#[derive(Deserialize)]
struct ModelIndex {
    #[serde(rename = "_class_name", default)]
    class: String,
    #[serde(default)]
    id2label: BTreeMap<u32, String>,
}

#[derive(Deserialize)]
struct TransformerConfig {
    num_embeds_ada_norm: u32,
}

/// A row of a class map.
#[derive(Deserialize)]
struct MapRow {
    model_class: String,
    classname: String,
    classidx: Option<String>,
}

impl ModelLabels {
    /// The labels of the model in `directory`; `None` for a model that takes prompts.
    pub fn of_model(directory: &Path) -> Result<Option<Self>, ClassError> {
        if is_contrastive(directory) {
            return Ok(None);
        }
        let index: ModelIndex = read_json(&directory.join("model_index.json"))?;
        if index.class != "DiTPipeline" {
            return Ok(None);
        }
        let config: TransformerConfig = read_json(&directory.join("transformer/config.json"))?;
        Ok(Some(Self { count: config.num_embeds_ada_norm, names: index.id2label }))
    }

    /// The label of a class of the model, given by number or by name.
    fn find(&self, text: &str) -> Option<u32> {
        let numbered = text.parse().ok().filter(|label| *label < self.count);
        numbered.or_else(|| self.names.iter().find(|(_, name)| *name == text).map(|(label, _)| *label))
    }

    fn name(&self, label: u32) -> String {
        self.names.get(&label).cloned().unwrap_or_else(|| format!("class {label}"))
    }

    fn check(&self, line: Option<u64>, label: i32) -> Result<u32, ClassError> {
        let known = u32::try_from(label).ok().filter(|label| *label < self.count);
        known.ok_or(ClassError::NoLabel { line, label: label.to_string(), count: self.count })
    }
}

fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T, ClassError> {
    let bytes = crate::files::read(path).map_err(|source| ClassError::Read { path: PathBuf::from(path), source })?;
    serde_json::from_slice(&bytes).map_err(|source| ClassError::Json { path: PathBuf::from(path), source })
}

impl Classes {
    /// Every class of a model, by its own names.
    pub fn of_model(labels: &ModelLabels) -> Self {
        let all = (0..labels.count).map(|label| (ClassIndex(label as i32), labels.name(label)));
        let names: BTreeMap<_, _> = all.collect();
        let prompts = names.iter().map(|(&class, name)| Prompt { text: name.clone(), class, label: None }).collect();
        Self { names, prompts }
    }

    /// The classes of a class file as a class-conditional model takes them: `classidx` is the model's label, and a class'
    /// prompts, which say nothing to it, are one.
    pub fn for_labels(mut self, labels: &ModelLabels) -> Result<Self, ClassError> {
        self.prompts.clear();
        for (class, name) in &self.names {
            labels.check(None, class.0)?;
            self.prompts.push(Prompt { text: name.clone(), class: *class, label: None });
        }
        Ok(self)
    }

    /// Reads a class map: CSV with the columns model_class (label or name), classname and, optionally, classidx. Each row
    /// makes one of the model's classes stand for one of the user's; several may stand for the same.
    pub fn read_map(path: &Path, labels: &ModelLabels) -> Result<Self, ClassError> {
        let text = crate::files::read_given_to_string(path)
            .map_err(|source| ClassError::Read { path: path.to_owned(), source })?;
        Self::parse_map(&text, labels)
    }

    /// Reads the text of a class map.
    pub fn parse_map(text: &str, labels: &ModelLabels) -> Result<Self, ClassError> {
        let text = text.trim_start_matches('\u{feff}');
        let mut reader = csv::ReaderBuilder::new().trim(csv::Trim::All).flexible(true).from_reader(text.as_bytes());
        let mut classes = Self::default();
        for (row, line) in reader.deserialize::<MapRow>().zip(2u64..) {
            let wrong = |problem| ClassError::Row { line, problem };
            let row = row.map_err(|e| wrong(format!("{e}; the columns are model_class,classname,classidx")))?;
            let label = labels.find(&row.model_class).ok_or_else(|| ClassError::NoLabel {
                line: Some(line),
                label: row.model_class.clone(),
                count: labels.count,
            })?;
            let named = classes.names.iter().find(|(_, name)| **name == row.classname).map(|(class, _)| *class);
            let class = match row.classidx.as_deref() {
                None | Some("") => named.unwrap_or(ClassIndex(classes.names.len() as i32)),
                Some(text) => {
                    ClassIndex(text.parse().map_err(|_| wrong(format!("classidx '{text}' is not a whole number")))?)
                }
            };
            classes.name_class(line, class, &row.classname)?;
            let text = labels.name(label);
            let label = Some(label as i32);
            if let Some(twice) = classes.prompts.iter().find(|prompt| prompt.label == label) {
                let other = classes.name(twice.class);
                return Err(wrong(format!("the model's class {} already stands for '{other}'", row.model_class)));
            }
            classes.prompts.push(Prompt { text, class, label });
        }
        if classes.prompts.is_empty() { Err(ClassError::Empty) } else { Ok(classes) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels() -> ModelLabels {
        let names = [(0, "tench"), (1, "hen"), (2, "cock")].map(|(label, name)| (label, name.to_owned()));
        ModelLabels { count: 4, names: names.into() }
    }

    #[test]
    fn all_of_a_models_classes_are_the_default() {
        let classes = Classes::of_model(&labels());
        assert_eq!(classes.prompts.len(), 4);
        assert_eq!((classes.name(ClassIndex(1)), classes.name(ClassIndex(3))), ("hen", "class 3"));
    }

    #[test]
    fn a_class_files_index_is_the_models_label() {
        let file = Classes::parse("prompt,classname,classidx\na,hen,1\nb,hen,1\nc,cock,2\n", &[]).unwrap();
        let classes = file.for_labels(&labels()).unwrap();
        assert_eq!(classes.prompts.iter().map(|p| p.class.0).collect::<Vec<_>>(), [1, 2]);
        let error = Classes::parse("prompt,classname,classidx\na,hen,4\n", &[]).unwrap().for_labels(&labels());
        assert!(error.unwrap_err().to_string().contains("no class 4"));
    }

    #[test]
    fn a_class_map_joins_the_models_classes() {
        let map = "model_class,classname,classidx\ntench,fish,7\n1,bird,9\ncock,bird,9\n";
        let classes = Classes::parse_map(map, &labels()).unwrap();
        assert_eq!(classes.names.len(), 2);
        let found: Vec<_> = classes.prompts.iter().map(|p| (p.label, p.class.0, p.text.as_str())).collect();
        assert_eq!(found, [(Some(0), 7, "tench"), (Some(1), 9, "hen"), (Some(2), 9, "cock")]);
        let numbered = Classes::parse_map("model_class,classname\n0,fish\n1,bird\n2,bird\n", &labels()).unwrap();
        assert_eq!(numbered.prompts.iter().map(|p| p.class.0).collect::<Vec<_>>(), [0, 1, 1]);
    }

    #[test]
    fn a_wrong_class_map_says_where() {
        let error = |map: &str| Classes::parse_map(map, &labels()).unwrap_err().to_string();
        assert!(error("model_class,classname\ndog,mammal\n").contains("line 2"));
        assert!(error("model_class,classname\n0,fish\n0,bird\n").contains("already stands for 'fish'"));
        assert!(error("classname\nfish\n").contains("model_class,classname,classidx"));
        assert!(error("model_class,classname\n").contains("no class"));
    }
}
