//! Groups above classes, as in WordNet: a race asks about the groups first, and only then about what is in those that are
//! left (hierarchical pruning, Shanbhag et al. 2024).

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{Classes, DEFAULT_TEMPLATE};
use crate::ids::ClassIndex;

/// Levels of groups; WordNet has some twenty.
const DEEPEST: usize = 100;

/// Groups of classes, each after the groups it is in.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Vec<Group>")]
pub struct Hierarchy(Vec<Group>);

/// What several classes, or groups of them, have in common.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Group {
    /// What it is called.
    pub name: String,
    /// What the text encoder is given.
    pub prompts: Vec<String>,
    /// The groups in it, by position.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub groups: Vec<u32>,
    /// The classes in it that are in none of these.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub classes: Vec<ClassIndex>,
}

/// A hierarchy that can't be used.
#[derive(Debug, thiserror::Error)]
pub enum HierarchyError {
    /// The file could not be read.
    #[error("reading the hierarchy {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// A row is wrong.
    #[error(
        "the hierarchy, line {line}: {problem}; write CSV with the columns class,parent, or one name per line, indented below what it is in"
    )]
    Row {
        /// 1-based line.
        line: u64,
        /// What is wrong.
        problem: String,
    },
    /// A name without anything below that is no class, while there are classes that are missing.
    #[error("the hierarchy: '{name}' is not a class of the job and has none below it{}, while '{class}' is missing: write classes like the class file does", more(*.others))]
    Unknown {
        /// The name.
        name: String,
        /// The class.
        class: String,
        /// How many more there are.
        others: usize,
    },
    /// Something is in itself.
    #[error("the hierarchy: '{0}' is in itself, by way of what is in it: take one of the links out")]
    Circular(String),
    /// Something is below too much.
    #[error(
        "the hierarchy: '{0}' is {DEEPEST} levels deep, and each level takes every image a round: leave levels out"
    )]
    Deep(String),
    /// There is nothing to ask about first.
    #[error("the hierarchy puts no two classes into a group: leave it out, or give each group at least two")]
    Flat,
}

fn more(others: usize) -> String {
    if others > 0 { format!(" ({others} more are like it)") } else { String::new() }
}

impl TryFrom<Vec<Group>> for Hierarchy {
    type Error = String;

    fn try_from(groups: Vec<Group>) -> Result<Self, String> {
        let follows = |(i, group): (usize, &Group)| {
            group.groups.iter().all(|&member| (i + 1..groups.len()).contains(&(member as usize)))
        };
        if groups.iter().enumerate().all(follows) {
            Ok(Self(groups))
        } else {
            Err("a group must follow those that it is in".into())
        }
    }
}

impl Hierarchy {
    /// Reads a hierarchy above some classes. The groups' prompts follow from their names by `templates`, which may be empty.
    pub fn read(path: &Path, classes: &Classes, templates: &[String]) -> Result<Self, HierarchyError> {
        let text = crate::files::read_given_to_string(path)
            .map_err(|source| HierarchyError::Read { path: path.to_owned(), source })?;
        Self::parse(&text, classes, templates)
    }

    /// Reads the text of a hierarchy: CSV with the columns `class` and `parent`, or names below each other, indented.
    pub fn parse(text: &str, classes: &Classes, templates: &[String]) -> Result<Self, HierarchyError> {
        let text = text.trim_start_matches('\u{feff}');
        let columns: Vec<_> = text.lines().next().unwrap_or_default().split(',').map(str::trim).collect();
        let links = match columns.contains(&"class") && columns.contains(&"parent") {
            true => csv_links(text)?,
            false => outline_links(text)?,
        };
        Builder::new(&links, classes).build(templates)
    }

    /// The groups, each after those it is in.
    pub fn groups(&self) -> &[Group] {
        &self.0
    }
}

/// A name, and what it is in.
type Link = (String, Option<String>);

fn csv_links(text: &str) -> Result<Vec<Link>, HierarchyError> {
    #[derive(Deserialize)]
    struct Row {
        class: String,
        parent: String,
    }
    let mut reader = csv::ReaderBuilder::new().trim(csv::Trim::All).flexible(true).from_reader(text.as_bytes());
    let link = |(i, row): (u64, Result<Row, csv::Error>)| match row {
        Ok(Row { class, parent }) if !class.is_empty() => Ok((class, Some(parent).filter(|p| !p.is_empty()))),
        Ok(_) => Err(HierarchyError::Row { line: i + 2, problem: "the class has no name".into() }),
        Err(error) => Err(HierarchyError::Row { line: i + 2, problem: error.to_string() }),
    };
    (0..).zip(reader.deserialize::<Row>()).map(link).collect()
}

fn outline_links(text: &str) -> Result<Vec<Link>, HierarchyError> {
    let mut above: Vec<(usize, String)> = Vec::new();
    let mut links = Vec::new();
    for (i, line) in (1u64..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty()) {
        let name = line.trim();
        let indent = &line[..line.len() - line.trim_start().len()];
        if indent.contains(' ') && indent.contains('\t') {
            return Err(HierarchyError::Row { line: i, problem: "it is indented by both spaces and tabs".into() });
        }
        above.retain(|(depth, _)| *depth < indent.len());
        links.push((name.to_owned(), above.last().map(|(_, name)| name.clone())));
        above.push((indent.len(), name.to_owned()));
    }
    Ok(links)
}

/// Something that is in a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Member<'a> {
    Class(ClassIndex),
    Group(&'a str),
}

/// Makes groups of links.
struct Builder<'a> {
    classes: HashMap<&'a str, Vec<ClassIndex>>,
    /// What is in something, by its name; in order, each once.
    below: BTreeMap<&'a str, Vec<&'a str>>,
    names: BTreeSet<&'a str>,
    /// What groups come to, once that is known.
    members: HashMap<&'a str, Vec<Member<'a>>>,
}

impl<'a> Builder<'a> {
    fn new(links: &'a [Link], classes: &'a Classes) -> Self {
        let mut by_name: HashMap<&str, Vec<ClassIndex>> = HashMap::new();
        for (index, name) in &classes.names {
            by_name.entry(name).or_default().push(*index);
        }
        let mut below: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for (name, parent) in links {
            if let Some(parent) = parent {
                let members = below.entry(parent).or_default();
                if !members.contains(&name.as_str()) {
                    members.push(name);
                }
            }
        }
        let names = links.iter().flat_map(|(name, parent)| [Some(name), parent.as_ref()]).flatten();
        Self { classes: by_name, below, names: names.map(String::as_str).collect(), members: HashMap::new() }
    }

    fn build(mut self, templates: &[String]) -> Result<Hierarchy, HierarchyError> {
        // In a larger tree, in which every class is found, what holds no class does not matter.
        let is_known = |name: &&&str| self.classes.contains_key(**name) || self.below.contains_key(**name);
        let mut unknown = self.names.iter().filter(|name| !is_known(name));
        if let Some(name) = unknown.next()
            && let Some(class) = self.classes.keys().filter(|class| !self.names.contains(**class)).min()
        {
            let (name, class) = ((*name).to_owned(), (*class).to_owned());
            return Err(HierarchyError::Unknown { name, class, others: unknown.count() });
        }
        let groups: Vec<&str> = self.below.keys().copied().collect();
        for group in groups {
            self.resolve(group, &mut Vec::new())?;
        }
        let order = self.parents_first();
        if order.is_empty() {
            return Err(HierarchyError::Flat);
        }
        let position: HashMap<&str, u32> = order.iter().copied().zip(0..).collect();
        let group = |name: &&str| {
            let members = self.members.get(name).map_or(&[][..], Vec::as_slice);
            let groups = members.iter().filter_map(|member| match member {
                Member::Group(name) => position.get(name).copied(),
                Member::Class(_) => None,
            });
            let classes = members.iter().filter_map(|member| match member {
                Member::Class(class) => Some(*class),
                Member::Group(_) => None,
            });
            let prompts = match templates {
                [] => vec![DEFAULT_TEMPLATE.replace("{}", name)],
                templates => templates.iter().map(|template| template.replace("{}", name)).collect(),
            };
            Group { name: (*name).to_owned(), prompts, groups: groups.collect(), classes: classes.collect() }
        };
        Ok(Hierarchy(order.iter().map(group).collect()))
    }

    /// What a name stands for within a group: itself, or what is in it where that is one thing alone.
    fn resolve(&mut self, name: &'a str, path: &mut Vec<&'a str>) -> Result<Vec<Member<'a>>, HierarchyError> {
        let own = self.classes.get(name).into_iter().flatten().map(|class| Member::Class(*class));
        let mut members: Vec<Member<'a>> = own.collect();
        let Some(below) = self.below.get(name).cloned() else { return Ok(members) };
        if path.contains(&name) {
            return Err(HierarchyError::Circular(name.to_owned()));
        }
        if path.len() == DEEPEST {
            return Err(HierarchyError::Deep(name.to_owned()));
        }
        if !self.members.contains_key(name) {
            path.push(name);
            for member in below {
                members.extend(self.resolve(member, path)?);
            }
            path.pop();
            members.sort_unstable();
            members.dedup();
            self.members.insert(name, members);
        }
        Ok(match self.members.get(name).map(Vec::as_slice) {
            None | Some([]) => Vec::new(),
            Some([one]) => vec![*one],
            Some(_) => vec![Member::Group(name)],
        })
    }

    /// The groups that hold more than one thing, each after those that it is in (Kahn, 1962).
    fn parents_first(&self) -> Vec<&'a str> {
        let groups = self.members.iter().filter(|(_, members)| members.len() > 1);
        let mut parents: BTreeMap<&str, usize> = groups.clone().map(|(name, _)| (*name, 0)).collect();
        let inner = |name: &str| {
            let members = self.members.get(name).into_iter().flatten();
            members.filter_map(|member| match member {
                Member::Group(name) => Some(*name),
                Member::Class(_) => None,
            })
        };
        for member in groups.flat_map(|(name, _)| inner(name)) {
            *parents.entry(member).or_default() += 1;
        }
        let mut free: BTreeSet<&str> =
            parents.iter().filter(|(_, count)| **count == 0).map(|(name, _)| *name).collect();
        let mut order = Vec::new();
        while let Some(name) = free.pop_first() {
            order.push(name);
            for member in inner(name) {
                let count = parents.entry(member).or_default();
                *count -= 1;
                if *count == 0 {
                    free.insert(member);
                }
            }
        }
        order
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn animals() -> Classes {
        Classes::parse("husky\npug\ntabby\noak\ncar", &[]).unwrap()
    }

    fn parse(text: &str) -> Result<Hierarchy, HierarchyError> {
        Hierarchy::parse(text, &animals(), &[])
    }

    fn shape(hierarchy: &Hierarchy) -> Vec<(&str, &[u32], Vec<i32>)> {
        let of = |group: &Group| group.classes.iter().map(|class| class.0).collect();
        hierarchy.groups().iter().map(|group| (group.name.as_str(), &group.groups[..], of(group))).collect()
    }

    #[test]
    fn links_and_outlines_say_the_same() {
        let csv = "class,parent\nhusky,dog\npug,dog\ndog,animal\ntabby,animal\n";
        let outline = "animal\n  dog\n    husky\n    pug\n  tabby\ncar\n";
        let hierarchy = parse(csv).unwrap();
        assert_eq!(shape(&hierarchy), [("animal", &[1u32][..], vec![2]), ("dog", &[], vec![0, 1])]);
        assert_eq!(parse(outline).unwrap(), hierarchy);
        assert_eq!(hierarchy.groups()[1].prompts, ["a photo of a dog"]);
        let templates = ["a {}".to_owned(), "the {}".to_owned()];
        let templated = Hierarchy::parse(csv, &animals(), &templates).unwrap();
        assert_eq!(templated.groups()[0].prompts, ["a animal", "the animal"]);
        assert_eq!(serde_json::from_str::<Hierarchy>(&serde_json::to_string(&hierarchy).unwrap()).unwrap(), hierarchy);
    }

    #[test]
    fn a_group_of_one_is_what_is_in_it_and_a_class_may_have_several_parents() {
        // The plant is an oak and nothing else; the husky is a dog and a worker.
        let csv = "class,parent\nhusky,dog\npug,dog\nhusky,worker\ncar,worker\noak,plant\nplant,thing\nworker,thing\n";
        let hierarchy = parse(csv).unwrap();
        assert_eq!(
            shape(&hierarchy),
            [("dog", &[][..], vec![0, 1]), ("thing", &[2][..], vec![3]), ("worker", &[], vec![0, 4])]
        );
    }

    #[test]
    fn branches_of_a_larger_tree_without_any_class_are_left_out() {
        let outline = "thing\n  animal\n    dog\n      husky\n      pug\n      wolf\n    tabby\n  oak\n  car\n  rock\n    granite";
        let hierarchy = parse(outline).unwrap();
        assert_eq!(
            shape(&hierarchy),
            [("thing", &[1][..], vec![3, 4]), ("animal", &[2][..], vec![2]), ("dog", &[], vec![0, 1])]
        );
    }

    #[test]
    fn a_class_with_classes_below_is_one_of_its_group() {
        let classes = Classes::parse("dog\npug\ncar", &[]).unwrap();
        let hierarchy = Hierarchy::parse("class,parent\npug,dog\n", &classes, &[]).unwrap();
        assert_eq!(shape(&hierarchy), [("dog", &[][..], vec![0, 1])]);
    }

    #[test]
    fn what_makes_no_hierarchy_is_refused_with_the_remedy() {
        let message = |text: &str| parse(text).unwrap_err().to_string();
        let strange = message("class,parent\nhusky,dog\npug,dog\nwolf,dog\nfox,dog\n");
        assert!(strange.contains("'fox' is not a class") && strange.contains("1 more"), "{strange}");
        assert!(strange.contains("'car' is missing"), "{strange}");
        assert!(message("class,parent\ndog,animal\nanimal,dog\nhusky,dog\n").contains("is in itself"));
        let deep: String = (0..101).map(|i| format!("{}g{i}\n", " ".repeat(i))).collect();
        assert!(message(&format!("{deep}{}husky\ntabby\npug\noak\ncar", " ".repeat(101))).contains("levels deep"));
        assert!(message("husky\npug\n").contains("no two classes"));
        assert!(message("class,parent\n,dog\n").contains("line 2"));
        assert!(message("dog\n \thusky\n").contains("both spaces and tabs"));
        let looped = r#"[{"name": "a", "prompts": ["a"], "groups": [0]}]"#;
        assert!(serde_json::from_str::<Hierarchy>(looped).is_err());
    }
}
