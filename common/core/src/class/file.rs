//! Reads class files, and refuses classes that can't be told apart.

use std::collections::HashMap;

use super::{ClassError, Classes, DEFAULT_TEMPLATE, Prompt};
use crate::hand_table::{At, HandError, HandTable, HandText};
use crate::ids::ClassIndex;
use crate::text::{excerpt, normal};

/// The accepted forms of a class file.
const FORMS: &str = "one class per line, a JSON list of names, or CSV with the columns prompt,classname,classidx";

/// What tells classes apart for a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum KnownBy {
    /// Their prompts, so that two classes must not share one.
    Prompts,
    /// The model's own labels.
    Labels,
}

/// The classes read from a file, with the place of each one's first row.
#[derive(Debug)]
pub(super) struct ClassReader<'a> {
    text: &'a HandText,
    pub(super) classes: Classes,
    places: HashMap<ClassIndex, At>,
    by_name: HashMap<String, ClassIndex>,
    by_prompt: HashMap<String, ClassIndex>,
    known_by: KnownBy,
}

impl<'a> ClassReader<'a> {
    pub(super) fn new(text: &'a HandText, known_by: KnownBy) -> Self {
        Self {
            text,
            classes: Classes::default(),
            places: HashMap::new(),
            by_name: HashMap::new(),
            by_prompt: HashMap::new(),
            known_by,
        }
    }

    /// Reads a class file. `templates` may be empty: rows without a prompt then use [`DEFAULT_TEMPLATE`].
    pub(super) fn read(mut self, templates: &[String]) -> Result<Self, ClassError> {
        if let Some(bad) = templates.iter().find(|t| !t.contains("{}")) {
            return Err(ClassError::Template(bad.clone()));
        }
        let text = self.text;
        if is_json(text) {
            self.read_json(templates)?;
        } else if let Some(table) = text.table(|header| header.has("classname"))? {
            self.read_table(&table, templates)?;
        } else if text.is_called_a_table() && text.lines().next().is_some() {
            return Err(ClassError::File(text.wrong(format!(
                "it has no column 'classname': its first line must name the columns prompt,classname,classidx (prompt and \
                 classidx may be left out), and names {}; call a list of one class per line .txt",
                text.shown_header()
            ))));
        } else {
            for (index, (line, name)) in (0..).zip(text.lines()) {
                self.push(At::Line(line), ClassIndex(index), name, None, templates)?;
            }
        }
        if self.classes.prompts.is_empty() {
            return Err(ClassError::File(text.wrong(format!("it holds no class: write {FORMS}"))));
        }
        Ok(self)
    }

    fn read_json(&mut self, templates: &[String]) -> Result<(), HandError> {
        let names: Vec<String> = serde_json::from_str(self.text.text()).map_err(|error| {
            self.text.wrong(format!("it is not a JSON list of names like [\"cat\", \"dog\"] ({error}): write {FORMS}"))
        })?;
        for (index, name) in (0..).zip(&names) {
            self.push(At::Item(index as u64 + 1), ClassIndex(index), name, None, templates)?;
        }
        Ok(())
    }

    fn read_table(&mut self, table: &HandTable<'_>, templates: &[String]) -> Result<(), HandError> {
        let name = table.required("classname", "prompt,classname,classidx")?;
        let (prompt, index) = (table.column("prompt")?, table.column("classidx")?);
        for (position, row) in (0..).zip(table.rows()) {
            let row = row?;
            let index = self.index(row.line, row.filled(index))?.unwrap_or(ClassIndex(position));
            self.push(At::Line(row.line), index, row.cell(name), row.filled(prompt), templates)?;
        }
        Ok(())
    }

    /// Parses a class index.
    pub(super) fn index(&self, line: u64, text: Option<&str>) -> Result<Option<ClassIndex>, HandError> {
        let parse = |text: &str| {
            let problem = || format!("classidx '{}' is not a whole number", excerpt(text));
            text.parse().map(ClassIndex).map_err(|_| self.text.wrong_in(line, problem()))
        };
        text.map(parse).transpose()
    }

    /// Adds a class with its prompt, or with one prompt per template.
    fn push(
        &mut self,
        at: At,
        index: ClassIndex,
        name: &str,
        prompt: Option<&str>,
        templates: &[String],
    ) -> Result<(), HandError> {
        let name = self.name_class(at, index, name)?;
        if templates.is_empty() {
            let text = prompt.map_or_else(|| DEFAULT_TEMPLATE.replace("{}", &name), str::to_owned);
            return self.push_prompt(at, Prompt { text, class: index, label: None });
        }
        // Templates contain class names, so they replace the file's own prompts.
        for template in templates {
            let text = template.replace("{}", &name);
            if self.by_prompt.get(normal(text.trim()).as_ref()) != Some(&index) {
                self.push_prompt(at, Prompt { text, class: index, label: None })?;
            }
        }
        Ok(())
    }

    /// Adds a prompt, which must not belong to another class.
    fn push_prompt(&mut self, at: At, prompt: Prompt) -> Result<(), HandError> {
        let first = *self.by_prompt.entry(normal(prompt.text.trim()).into_owned()).or_insert(prompt.class);
        if self.known_by == KnownBy::Prompts && first != prompt.class {
            return Err(self.text.wrong_at(
                at,
                format!(
                    "the prompt '{}' of class {} is that of class {} too, so that the two can't be told apart: give each \
                     class a prompt of its own, or rows of one class one classidx",
                    excerpt(&prompt.text),
                    self.shown(prompt.class),
                    self.shown(first)
                ),
            ));
        }
        self.classes.prompts.push(prompt);
        Ok(())
    }

    /// Records a class's name and returns it. The name must match earlier rows of this class, and no other class may have it.
    pub(super) fn name_class(&mut self, at: At, index: ClassIndex, name: &str) -> Result<String, HandError> {
        let name = normal(name.trim()).into_owned();
        if name.is_empty() {
            return Err(self.text.wrong_at(at, "the class name is empty"));
        }
        if let Some(other) = self.classes.names.get(&index).filter(|other| **other != name) {
            let problem = format!(
                "class {index} is '{}' here and '{}' above: give each class its own classidx",
                excerpt(&name),
                excerpt(other)
            );
            return Err(self.text.wrong_at(at, problem));
        }
        let first = *self.by_name.entry(name.clone()).or_insert(index);
        if first != index {
            let problem = format!(
                "class {index} is called '{}', as is class {}: two classes of one name can't be told apart, so rename one, \
                 or give rows of one class one classidx",
                excerpt(&name),
                self.shown(first)
            );
            return Err(self.text.wrong_at(at, problem));
        }
        self.places.entry(index).or_insert(at);
        self.classes.names.insert(index, name.clone());
        Ok(name)
    }

    /// The class with a name.
    pub(super) fn named(&self, name: &str) -> Option<ClassIndex> {
        self.by_name.get(normal(name.trim()).as_ref()).copied()
    }

    /// Where a class was first named.
    pub(super) fn place(&self, class: ClassIndex) -> Option<At> {
        self.places.get(&class).copied()
    }

    fn shown(&self, class: ClassIndex) -> String {
        let place = self.place(class).map_or_else(String::new, |at| format!(" ({at})"));
        format!("{class} '{}'{place}", excerpt(self.classes.name(class)))
    }
}

/// Whether a class file is a JSON list. A class may also be called `[unknown]`.
fn is_json(text: &HandText) -> bool {
    let start = text.text().trim_start().strip_prefix('[').map(str::trim_start);
    text.is_called(".json") || start.is_some_and(|rest| rest.starts_with('"'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(file: &str, content: &str) -> Result<Classes, ClassError> {
        let text = HandText::new("the class file", file, content.into())?;
        Ok(ClassReader::new(&text, KnownBy::Prompts).read(&[])?.classes)
    }

    fn error(file: &str, content: &str) -> String {
        read(file, content).unwrap_err().to_string()
    }

    fn texts(classes: &Classes) -> Vec<(&str, &str, i32)> {
        classes.prompts.iter().map(|p| (p.text.as_str(), classes.name(p.class), p.class.0)).collect()
    }

    #[test]
    fn a_class_file_reads_the_same_in_every_saved_form() {
        for content in [
            "prompt;classname;classidx\na photo of the digit zero;zero;0\nthe one, the only;one;7\n",
            "\"prompt\",\"classname\",\"classidx\"\r\n\"a photo of the digit zero\",\"zero\",\"0\"\r\n\"the one, the only\",\"one\",\"7\"\r\n",
            "\"\",\"prompt\",\"classname\",\"classidx\"\n\"1\",\"a photo of the digit zero\",\"zero\",\"0\"\n\"2\",\"the one, the only\",\"one\",\"7\"\n",
            "Prompt,ClassName,ClassIdx\na photo of the digit zero,zero,0\n\"the one, the only\",one,7\n",
            "prompt\tclassname\tclassidx\na photo of the digit zero\tzero\t0\nthe one, the only\tone\t7\n",
            "sep=;\r\nclassidx;classname;prompt;note\r\n0;zero;a photo of the digit zero;x\r\n7;one;the one, the only;\r\n",
        ] {
            for file in ["classes.csv", "classes.tsv", "classes.txt", "/dev/fd/63"] {
                let classes = read(file, content).unwrap();
                let expected = [("a photo of the digit zero", "zero", 0), ("the one, the only", "one", 7)];
                assert_eq!(texts(&classes), expected, "{file}: {content:?}");
            }
        }
    }

    #[test]
    fn names_are_lines_or_a_json_list() {
        let expected = [("a photo of a cat", "cat", 0), ("a photo of a [dog]", "[dog]", 1)];
        assert_eq!(texts(&read("classes.json", "[\"cat\", \"[dog]\"]").unwrap()), expected);
        assert_eq!(texts(&read("classes.txt", " [\n\"cat\",\n\"[dog]\"]\n").unwrap()), expected);
        assert_eq!(texts(&read("classes.txt", "cat\r\n[dog]\r\n").unwrap()), expected);
        assert!(error("classes.json", "{\"0\": \"cat\"}").contains("classes.json: it is not a JSON list of names"));
        assert!(
            error("classes.json", "[\"cat\", \"dog\", \"cat\"]").contains("classes.json, item 3: class 2 is called")
        );
    }

    #[test]
    fn a_table_without_class_names_is_refused_with_the_header_it_has() {
        let found = error("/data/classes.csv", "label;text\ncat;a cat\n");
        assert!(found.contains("the class file /data/classes.csv: it has no column 'classname'"), "{found}");
        assert!(found.contains("prompt,classname,classidx") && found.contains("names label, text;"), "{found}");
        assert!(error("classes.TSV", "cat\ndog\n").contains("names cat; call a list of one class per line .txt"));
    }

    #[test]
    fn classes_that_cannot_be_told_apart_are_refused_by_both_names() {
        let twice = error("classes.txt", "missile\nsunglasses\n missile \n");
        assert!(twice.contains("line 3: class 2 is called 'missile', as is class 0 'missile' (line 1)"), "{twice}");
        // The second is written with a combining accent.
        let accents = error("classes.txt", "caf\u{e9}\ncafe\u{301}\n");
        assert!(accents.contains("line 2: class 1 is called 'caf\u{e9}'"), "{accents}");
        let unnumbered = error("classes.csv", "prompt,classname\na cat,cat\na kitten,cat\n");
        assert!(unnumbered.contains("give rows of one class one classidx"), "{unnumbered}");
        let prompt = error("classes.csv", "prompt,classname,classidx\na pet,cat,0\na bird,owl,1\n a pet ,dog,2\n");
        assert!(
            prompt.contains("line 4: the prompt 'a pet' of class 2 'dog' (line 4) is that of class 0 'cat'"),
            "{prompt}"
        );
    }

    #[test]
    fn templates_that_give_two_classes_one_prompt_are_refused() {
        let text = HandText::new("the class file", "classes.txt", b"cat\ncats\n".to_vec()).unwrap();
        let templates = ["{}".to_owned(), "{}s".to_owned()];
        let found = ClassReader::new(&text, KnownBy::Prompts).read(&templates).unwrap_err().to_string();
        assert!(
            found.contains("line 2: the prompt 'cats' of class 1 'cats' (line 2) is that of class 0 'cat'"),
            "{found}"
        );
        // A class-conditional model does not use prompts.
        assert!(ClassReader::new(&text, KnownBy::Labels).read(&templates).is_ok());
    }

    #[test]
    fn several_prompts_of_one_class_may_be_the_same() {
        let classes = read("c.csv", "prompt,classname,classidx\na cat,cat,3\na cat,cat,3\n").unwrap();
        assert_eq!(texts(&classes), [("a cat", "cat", 3), ("a cat", "cat", 3)]);
    }

    #[test]
    fn errors_name_the_line_of_the_file() {
        let found = error("c.csv", "prompt,classname,classidx\r\n\r\na,cat,0\r\nb,dog,x\r\n");
        assert!(found.contains("the class file c.csv, line 4: classidx 'x' is not a whole number"), "{found}");
        assert!(error("c.csv", "prompt,classname,classidx\na cat, asleep,cat,0\n").contains("line 2: it has 4 fields"));
    }
}
