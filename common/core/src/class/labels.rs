//! The classes of a class-conditional model, which identifies them by label instead of by prompt.

use std::collections::{BTreeMap, HashMap};

use super::file::{ClassReader, KnownBy};
use super::{ClassError, Classes, Prompt};
use crate::hand_table::{At, HandText};
use crate::ids::ClassIndex;
use crate::text::{excerpt, normal};

/// How errors name a class map.
pub const CLASS_MAP: &str = "the class map";

/// The labels a class-conditional model was trained on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelLabels {
    /// How many labels there are: 0 to `count - 1`.
    pub count: u32,
    /// Their names (`id2label`), if the model has them.
    pub names: BTreeMap<u32, String>,
}

/// The columns of a class map.
const MAP_COLUMNS: &str = "model_class,classname,classidx";

impl ModelLabels {
    /// The label of one of the model's classes, from its number or name; or why there is none.
    fn find(&self, text: &str) -> Result<u32, String> {
        if let Some(label) = text.parse().ok().filter(|label| *label < self.count) {
            return Ok(label);
        }
        let name = normal(text);
        let mut named = self.names.iter().filter(|(_, other)| normal(other.trim()) == name).map(|(label, _)| *label);
        match (named.next(), named.next()) {
            (Some(label), None) => Ok(label),
            (Some(first), Some(second)) => Err(format!(
                "the model calls both its class {first} and its class {second} '{}': give the number",
                excerpt(text)
            )),
            (None, _) => Err(self.unknown(text)),
        }
    }

    fn name(&self, label: u32) -> String {
        self.names.get(&label).cloned().unwrap_or_else(|| format!("class {label}"))
    }

    fn unknown(&self, label: &str) -> String {
        format!(
            "the model has no class {}: use its labels 0 to {} (or names), or map them with a class map",
            excerpt(label),
            self.count.saturating_sub(1)
        )
    }
}

impl Classes {
    /// All classes of a model, with its own names.
    pub fn of_model(labels: &ModelLabels) -> Self {
        let all = (0..labels.count).map(|label| (ClassIndex(label as i32), labels.name(label)));
        let names: BTreeMap<_, _> = all.collect();
        let mut first_named: HashMap<&str, ClassIndex> = HashMap::new();
        for (class, name) in &names {
            let first = *first_named.entry(name).or_insert(*class);
            if first != *class {
                tracing::warn!(
                    "the model calls both its class {first} and its class {class} '{}': a label of this name means the first, and a class map gives names of your own",
                    excerpt(name)
                );
            }
        }
        let prompts = names.iter().map(|(&class, name)| Prompt { text: name.clone(), class, label: None }).collect();
        Self { names, prompts }
    }

    /// Reads a class file for a class-conditional model. `classidx` is the model's label. The model does not use prompts, so
    /// each class gets only one.
    pub fn of_labels(text: &HandText, templates: &[String], labels: &ModelLabels) -> Result<Self, ClassError> {
        let reader = ClassReader::new(text, KnownBy::Labels).read(templates)?;
        let names = &reader.classes.names;
        if let Some(class) =
            names.keys().find(|class| u32::try_from(class.0).map_or(true, |label| label >= labels.count))
        {
            let problem = labels.unknown(&class.to_string());
            return Err(ClassError::File(match reader.place(*class) {
                Some(at) => text.wrong_at(at, problem),
                None => text.wrong(problem),
            }));
        }
        let prompts = names.iter().map(|(&class, name)| Prompt { text: name.clone(), class, label: None }).collect();
        Ok(Self { prompts, names: reader.classes.names })
    }

    /// Reads the text of a class map.
    pub fn parse_map(text: &str, labels: &ModelLabels) -> Result<Self, ClassError> {
        Self::of_map(&HandText::new(CLASS_MAP, "in memory", text.into())?, labels)
    }

    /// Reads a class map: a table with the columns model_class (label or name), classname and, optionally, classidx. Each row
    /// maps one of the model's classes to one of the user's; several may map to the same.
    pub fn of_map(text: &HandText, labels: &ModelLabels) -> Result<Self, ClassError> {
        let table = text.table(|header| header.has("model_class") && header.has("classname"))?.ok_or_else(|| {
            let shown = text.shown_header();
            text.wrong(format!(
                "its first line must name the columns {MAP_COLUMNS} (classidx may be left out), and names {shown}"
            ))
        })?;
        let model_class = table.required("model_class", MAP_COLUMNS)?;
        let (name, index) = (table.required("classname", MAP_COLUMNS)?, table.column("classidx")?);
        let mut reader = ClassReader::new(text, KnownBy::Labels);
        for row in table.rows() {
            let row = row?;
            let wrong = |problem: String| text.wrong_in(row.line, problem);
            let (model_class, name) = (row.cell(model_class), row.cell(name));
            let label = labels.find(model_class).map_err(wrong)?;
            let next = ClassIndex(reader.classes.names.len() as i32);
            let class = reader.index(row.line, row.filled(index))?.or_else(|| reader.named(name)).unwrap_or(next);
            reader.name_class(At::Line(row.line), class, name)?;
            let known_as = Some(label as i32);
            if let Some(twice) = reader.classes.prompts.iter().find(|prompt| prompt.label == known_as) {
                let (model_class, other) = (excerpt(model_class), excerpt(reader.classes.name(twice.class)));
                return Err(wrong(format!("the model's class {model_class} already stands for '{other}'")).into());
            }
            reader.classes.prompts.push(Prompt { text: labels.name(label), class, label: known_as });
        }
        if reader.classes.prompts.is_empty() {
            return Err(text.wrong(format!("it holds no class: write CSV with the columns {MAP_COLUMNS}")).into());
        }
        Ok(reader.classes)
    }
}

#[cfg(test)]
mod tests {
    use super::super::CLASS_FILE;
    use super::*;

    fn labels() -> ModelLabels {
        let names = [(0, "tench"), (1, "hen"), (2, "cock")].map(|(label, name)| (label, name.to_owned()));
        ModelLabels { count: 4, names: names.into() }
    }

    #[test]
    fn the_default_is_all_classes_of_the_model() {
        let classes = Classes::of_model(&labels());
        assert_eq!(classes.prompts.len(), 4);
        assert_eq!((classes.name(ClassIndex(1)), classes.name(ClassIndex(3))), ("hen", "class 3"));
    }

    #[test]
    fn a_class_files_index_is_the_models_label() {
        let of = |text: &str| {
            let text = HandText::new(CLASS_FILE, "classes.csv", text.into()).unwrap();
            Classes::of_labels(&text, &[], &labels())
        };
        // The model does not use prompts, so classes may share one.
        let classes = of("prompt,classname,classidx\na,hen,1\nb,hen,1\na,cock,2\n").unwrap();
        assert_eq!(classes.prompts.iter().map(|p| p.class.0).collect::<Vec<_>>(), [1, 2]);
        let error = of("prompt,classname,classidx\na,hen,1\nb,cock,4\n").unwrap_err().to_string();
        assert!(
            error.contains("the class file classes.csv, line 3: the model has no class 4: use its labels 0 to 3"),
            "{error}"
        );
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
        assert!(
            error("Model_Class;ClassName\n0;fish\n1;bird\ncock;fish;\n5;x\n")
                .contains("line 5: the model has no class 5")
        );
        assert!(
            error("model_class,classname,classidx\n0,fish,1\n1,fish,2\n").contains("line 3: class 2 is called 'fish'")
        );
        assert!(error("model_class,classname\n0,fish\n0,bird\n").contains("already stands for 'fish'"));
        assert!(error("classname\nfish\n").contains("model_class,classname,classidx"));
        assert!(error("model_class,classname\n").contains("no class"));
        assert!(error("classname;label\nfish;0\n").contains("the class map in memory: its first line must name"));
    }

    #[test]
    fn a_name_shared_by_two_model_classes_is_refused_in_a_class_map() {
        let names = [(0, "crane"), (1, "crane"), (2, "caf\u{e9}")].map(|(label, name)| (label, name.to_owned()));
        let labels = ModelLabels { count: 3, names: names.into() };
        let error = Classes::parse_map("model_class,classname\ncrane,bird\n", &labels).unwrap_err().to_string();
        assert!(
            error.contains("line 2: the model calls both its class 0 and its class 1 'crane': give the number"),
            "{error}"
        );
        let numbered = Classes::parse_map("model_class,classname\n0,bird\ncafe\u{301},place\n", &labels).unwrap();
        assert_eq!(numbered.prompts.iter().map(|p| p.label).collect::<Vec<_>>(), [Some(0), Some(2)]);
    }
}
