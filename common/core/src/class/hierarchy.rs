//! Groups of classes, as in WordNet: a race compares the groups first, and then only the members of the remaining groups
//! (hierarchical pruning, Shanbhag et al. 2024).

use std::collections::{BTreeMap, BTreeSet, HashMap};

use serde::{Deserialize, Serialize};

use super::{Classes, DEFAULT_TEMPLATE};
use crate::hand_table::{HandError, HandRow, HandText};
use crate::ids::ClassIndex;
use crate::text::{excerpt, normal};

/// The most levels of groups; WordNet has about twenty.
const DEEPEST: usize = 100;

/// Groups of classes. Each group comes after the groups that contain it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Vec<Group>")]
pub struct Hierarchy(Vec<Group>);

/// A group of classes, or of other groups.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Group {
    /// Its name.
    pub name: String,
    /// The prompts for the text encoder.
    pub prompts: Vec<String>,
    /// The groups in it, as positions.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub groups: Vec<u32>,
    /// The classes that are directly in it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub classes: Vec<ClassIndex>,
}

/// An invalid hierarchy.
#[derive(Debug, thiserror::Error)]
pub enum HierarchyError {
    /// The file can't be read, or a row is wrong.
    #[error("{0}; write CSV with the columns class,parent, or one name per line, indented below what it is in")]
    File(#[from] HandError),
    /// A name without members that is not a class, while classes of the job are missing.
    #[error("the hierarchy: '{name}' is not a class of the job and has none below it{}, while '{class}' is missing: write classes like the class file does", more(*.others))]
    Unknown {
        /// The unknown name.
        name: String,
        /// The missing class.
        class: String,
        /// How many more unknown names there are.
        others: usize,
    },
    /// A group contains itself.
    #[error("the hierarchy: '{0}' contains itself, directly or through its members: remove one of the links")]
    Circular(String),
    /// The hierarchy is too deep.
    #[error(
        "the hierarchy: '{0}' is {DEEPEST} levels deep, and each level costs a round for every image: remove levels"
    )]
    Deep(String),
    /// Two members that may be compared have the same prompt.
    #[error(
        "the hierarchy: the group '{group}' and {other} have one prompt, '{prompt}', so that they can't be told apart: rename \
         one of them, or give the class another prompt"
    )]
    SamePrompt {
        /// A group.
        group: String,
        /// A group or class that is not in it.
        other: String,
        /// The prompt they share.
        prompt: String,
    },
    /// No group has two classes.
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
    /// Reads the text of a hierarchy: a table with the columns `class` and `parent`, or one name per line, indented below its
    /// group.
    pub fn parse(text: &str, classes: &Classes, templates: &[String]) -> Result<Self, HierarchyError> {
        Self::of_text(&HandText::new(HIERARCHY, "in memory", text.into())?, classes, templates)
    }

    /// Reads a hierarchy of some classes. `templates` make the groups' prompts from their names, and may be empty.
    pub fn of_text(text: &HandText, classes: &Classes, templates: &[String]) -> Result<Self, HierarchyError> {
        let links = match table_links(text)? {
            Some(links) => links,
            None if text.is_called_a_table() => {
                let shown = text.shown_header();
                return Err(text
                    .wrong(format!("its first line must name the columns class,parent, and names {shown}"))
                    .into());
            }
            None => outline_links(text)?,
        };
        let hierarchy = Builder::new(&links, classes).build(templates)?;
        hierarchy.check_prompts(classes)?;
        Ok(hierarchy)
    }

    /// Refuses a group that shares a prompt with something outside it: a round may compare the two.
    fn check_prompts(&self, classes: &Classes) -> Result<(), HierarchyError> {
        let of_text = |text: &str| normal(text.trim()).into_owned();
        let mut classes_with: HashMap<String, Vec<ClassIndex>> = HashMap::new();
        for prompt in &classes.prompts {
            classes_with.entry(of_text(&prompt.text)).or_default().push(prompt.class);
        }
        let mut groups_with: HashMap<String, Vec<usize>> = HashMap::new();
        for (at, group) in self.0.iter().enumerate() {
            for text in &group.prompts {
                let same =
                    |other| HierarchyError::SamePrompt { group: excerpt(&group.name), other, prompt: excerpt(text) };
                let key = of_text(text);
                let outside = |class: &&ClassIndex| !self.holds_class(at, **class);
                if let Some(class) = classes_with.get(&key).into_iter().flatten().find(outside) {
                    return Err(same(format!("the class '{}'", excerpt(classes.name(*class)))));
                }
                let groups = groups_with.entry(key).or_default();
                // A group comes after the groups that contain it.
                if let Some(other) = groups.iter().find(|other| **other != at && !self.holds_group(**other, at)) {
                    return Err(same(format!("the group '{}'", excerpt(&self.0[*other].name))));
                }
                groups.push(at);
            }
        }
        Ok(())
    }

    /// Whether `member` is `group` or inside it. Both are positions.
    fn holds_group(&self, group: usize, member: usize) -> bool {
        self.within(group).contains(&member)
    }

    fn holds_class(&self, group: usize, class: ClassIndex) -> bool {
        self.within(group).into_iter().any(|group| self.0[group].classes.contains(&class))
    }

    /// A group and all groups inside it, as positions.
    fn within(&self, group: usize) -> BTreeSet<usize> {
        let (mut found, mut open) = (BTreeSet::new(), vec![group]);
        while let Some(group) = open.pop() {
            if found.insert(group) {
                open.extend(self.0[group].groups.iter().map(|member| *member as usize));
            }
        }
        found
    }

    /// The groups. Each comes after the groups that contain it.
    pub fn groups(&self) -> &[Group] {
        &self.0
    }
}

/// A name and its parent.
type Link = (String, Option<String>);

/// How errors name a hierarchy file.
pub const HIERARCHY: &str = "the hierarchy";

/// The links of a table; `None` if the file is not a table.
fn table_links(text: &HandText) -> Result<Option<Vec<Link>>, HandError> {
    let Some(table) = text.table(|header| header.has("class") && header.has("parent"))? else { return Ok(None) };
    let (class, parent) = (table.required("class", "class,parent")?, table.required("parent", "class,parent")?);
    let name = |text: &str| normal(text).into_owned();
    let link = |row| {
        let row: HandRow = row?;
        match row.cell(class) {
            "" => Err(text.wrong_in(row.line, "the class has no name")),
            class => Ok((name(class), row.filled(Some(parent)).map(name))),
        }
    };
    table.rows().map(link).collect::<Result<_, _>>().map(Some)
}

fn outline_links(text: &HandText) -> Result<Vec<Link>, HandError> {
    let mut above: Vec<(usize, String)> = Vec::new();
    let mut links = Vec::new();
    for (number, line) in text.lines() {
        let name = normal(line.trim()).into_owned();
        let indent = &line[..line.len() - line.trim_start().len()];
        if indent.contains(' ') && indent.contains('\t') {
            return Err(text.wrong_in(number, "it is indented by both spaces and tabs"));
        }
        above.retain(|(depth, _)| *depth < indent.len());
        links.push((name.clone(), above.last().map(|(_, name)| name.clone())));
        above.push((indent.len(), name));
    }
    Ok(links)
}

/// A member of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Member<'a> {
    Class(ClassIndex),
    Group(&'a str),
}

/// Builds groups from links.
struct Builder<'a> {
    classes: HashMap<&'a str, Vec<ClassIndex>>,
    /// The members of each name, in order and without duplicates.
    below: BTreeMap<&'a str, Vec<&'a str>>,
    names: BTreeSet<&'a str>,
    /// The resolved members of each group.
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
        // If every class was found, this is a larger tree, and names that are not classes don't matter.
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

    /// What a name stands for in its group: itself, or its only member if it has just one.
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

    /// The groups with more than one member. Each comes after the groups that contain it (Kahn, 1962).
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
    fn tables_and_outlines_give_the_same_hierarchy() {
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
    fn a_group_of_one_is_replaced_by_its_member_and_a_class_may_have_several_parents() {
        // The only plant is an oak; the husky is both a dog and a worker.
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
    fn a_class_with_classes_below_it_is_a_member_of_its_own_group() {
        let classes = Classes::parse("dog\npug\ncar", &[]).unwrap();
        let hierarchy = Hierarchy::parse("class,parent\npug,dog\n", &classes, &[]).unwrap();
        assert_eq!(shape(&hierarchy), [("dog", &[][..], vec![0, 1])]);
    }

    #[test]
    fn a_hierarchy_reads_the_same_in_every_saved_and_unicode_form() {
        let expected = parse("class,parent\nhusky,dog\npug,dog\n").unwrap();
        for text in [
            "\u{feff}Class;Parent\r\nhusky;dog\r\npug;dog\r\n",
            "\"\",\"class\",\"parent\"\n\"1\",\"husky\",\"dog\"\n\"2\",\"pug\",\"dog\"\n",
            "parent\tclass\tnote\ndog\thusky\tx\ndog\tpug\t\n",
            "class,parent\ndog\nhusky,dog\npug,dog\n",
            "dog\r\n\thusky\r\n\tpug\r\n",
        ] {
            assert_eq!(parse(text).unwrap(), expected, "{text:?}");
        }
        let classes = Classes::parse("the\u{301}\ncaf\u{e9}\ncar", &[]).unwrap();
        let hierarchy = Hierarchy::parse("drink\n th\u{e9}\n cafe\u{301}\n", &classes, &[]).unwrap();
        assert_eq!(shape(&hierarchy), [("drink", &[][..], vec![0, 1])]);
        let headless = HandText::new(HIERARCHY, "tree.csv", b"husky;dog\npug;dog\n".to_vec()).unwrap();
        let error = Hierarchy::of_text(&headless, &animals(), &[]).unwrap_err().to_string();
        assert!(
            error.contains(
                "the hierarchy tree.csv: its first line must name the columns class,parent, and names husky, dog"
            ),
            "{error}"
        );
    }

    #[test]
    fn a_group_that_shares_a_prompt_with_a_non_member_is_refused() {
        let classes =
            Classes::parse("prompt,classname\na photo of a dog,husky\na pug,pug\na car,car\na bus,bus\n", &[]);
        let classes = classes.unwrap();
        let of = |text: &str| Hierarchy::parse(text, &classes, &[]);
        let error = of("class,parent\npug,dog\ncar,dog\n").unwrap_err().to_string();
        assert!(error.contains("the group 'dog' and the class 'husky' have one prompt, 'a photo of a dog'"), "{error}");
        // A group is never compared with its own members.
        assert!(of("class,parent\nhusky,dog\npug,dog\n").is_ok());
        let templates = ["{}".to_owned(), "{}s".to_owned()];
        let twins = "class,parent\nhusky,pet\npug,pet\ncar,pets\nbus,pets\n";
        let error = Hierarchy::parse(twins, &classes, &templates).unwrap_err().to_string();
        assert!(error.contains("the group 'pets' and the group 'pet' have one prompt, 'pets'"), "{error}");
    }

    #[test]
    fn invalid_hierarchies_are_refused_with_the_remedy() {
        let message = |text: &str| parse(text).unwrap_err().to_string();
        let strange = message("class,parent\nhusky,dog\npug,dog\nwolf,dog\nfox,dog\n");
        assert!(strange.contains("'fox' is not a class") && strange.contains("1 more"), "{strange}");
        assert!(strange.contains("'car' is missing"), "{strange}");
        assert!(message("class,parent\ndog,animal\nanimal,dog\nhusky,dog\n").contains("contains itself"));
        let deep: String = (0..101).map(|i| format!("{}g{i}\n", " ".repeat(i))).collect();
        assert!(message(&format!("{deep}{}husky\ntabby\npug\noak\ncar", " ".repeat(101))).contains("levels deep"));
        assert!(message("husky\npug\n").contains("no two classes"));
        assert!(message("class,parent\n,dog\n").contains("line 2"));
        assert!(message("dog\n \thusky\n").contains("both spaces and tabs"));
        let looped = r#"[{"name": "a", "prompts": ["a"], "groups": [0]}]"#;
        assert!(serde_json::from_str::<Hierarchy>(looped).is_err());
    }
}
