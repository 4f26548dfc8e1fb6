//! The contenders for a sample: its prompts, or its classes with all their prompts.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::class::{Classes, Hierarchy};
use crate::ids::{ClassIndex, PromptIndex};

/// How a class's score follows from its prompts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PromptEnsemble {
    /// A class scores as its best prompt does, and prompts are eliminated one by one, as in the reference code.
    #[default]
    Max,
    /// A class scores the mean over its prompts, which are eliminated together.
    Mean,
}

impl PromptEnsemble {
    /// Whether it is the default, which is not serialised.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

impl FromStr for PromptEnsemble {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "max" => Ok(Self::Max),
            "mean" => Ok(Self::Mean),
            other => Err(format!("unknown prompt ensemble '{other}': use max or mean")),
        }
    }
}

impl fmt::Display for PromptEnsemble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Max => "max",
            Self::Mean => "mean",
        })
    }
}

/// The contenders: prompts or classes, each of which is kept or eliminated as a whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Contenders {
    /// The contender of each prompt. Contenders are numbered in the order of their first prompts.
    of_prompt: Vec<u32>,
    /// The class of each prompt, by number.
    class_of_prompt: Vec<u32>,
    count: usize,
    ensemble: PromptEnsemble,
    /// How many of the prompts belong to classes. The prompts of groups follow.
    class_prompts: usize,
    groups: Groups,
}

/// The groups above the classes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Groups {
    /// The prompts of classes and groups that are in no group.
    top: Vec<PromptIndex>,
    /// For each prompt of a group, the prompts of the group's members.
    below: Vec<Vec<PromptIndex>>,
}

impl Contenders {
    /// `count` prompts, each of which is a contender.
    pub fn prompts(count: usize) -> Self {
        let each: Vec<u32> = (0..count as u32).collect();
        Self {
            of_prompt: each.clone(),
            class_of_prompt: each,
            count,
            ensemble: PromptEnsemble::Max,
            class_prompts: count,
            groups: Groups::default(),
        }
    }

    /// The contenders among a job's classes.
    pub fn of_classes(classes: &Classes, ensemble: PromptEnsemble) -> Self {
        let mut numbers: BTreeMap<ClassIndex, u32> = BTreeMap::new();
        let mut number = |class| {
            let next = numbers.len() as u32;
            *numbers.entry(class).or_insert(next)
        };
        let class_of_prompt: Vec<u32> = classes.prompts.iter().map(|prompt| number(prompt.class)).collect();
        match ensemble {
            PromptEnsemble::Max => Self { class_of_prompt, ..Self::prompts(classes.prompts.len()) },
            PromptEnsemble::Mean => {
                let (of_prompt, count) = (class_of_prompt.clone(), numbers.len());
                Self { of_prompt, class_of_prompt, count, ensemble, ..Self::prompts(classes.prompts.len()) }
            }
        }
    }

    /// Adds the groups of a hierarchy, which are compared before the classes. Their prompts follow those of the classes.
    pub fn below(mut self, hierarchy: &Hierarchy, classes: &Classes) -> Self {
        let classes_before = self.class_of_prompt.iter().max().map_or(0, |last| last + 1);
        let of_class = |class: &ClassIndex| {
            let prompts = (0..).map(PromptIndex).zip(&classes.prompts);
            prompts.filter(|(_, prompt)| prompt.class == *class).map(|(at, _)| at).collect::<Vec<_>>()
        };
        let mut own = Vec::new();
        for (group, number) in hierarchy.groups().iter().zip(classes_before..) {
            let first = self.of_prompt.len() as u32;
            own.push((first..first + group.prompts.len() as u32).map(PromptIndex).collect::<Vec<_>>());
            for _ in &group.prompts {
                // With `Mean`, a group competes with all its prompts, as a class does.
                let each = self.of_prompt.len() as u32;
                self.of_prompt.push(if self.ensemble == PromptEnsemble::Mean { number } else { each });
                self.class_of_prompt.push(number);
            }
        }
        let mut inside = BTreeSet::new();
        for group in hierarchy.groups() {
            let of_groups = group.groups.iter().filter_map(|member| own.get(*member as usize)).flatten().copied();
            let mut members: Vec<_> = of_groups.chain(group.classes.iter().flat_map(of_class)).collect();
            members.sort_unstable();
            inside.extend(members.iter().copied());
            self.groups.below.extend(vec![members; group.prompts.len()]);
        }
        let everything = (0..self.of_prompt.len() as u32).map(PromptIndex);
        self.groups.top = everything.filter(|prompt| !inside.contains(prompt)).collect();
        // A single group at the top decides nothing, so it is opened.
        while self.have_groups(&self.groups.top) && !self.are_rivals(&self.groups.top) {
            self.groups.top = self.opened(&self.groups.top);
        }
        self
    }

    /// The contenders without the groups.
    pub fn without_groups(&self) -> Self {
        let classes = |all: &[u32]| all[..self.class_prompts].to_vec();
        Self {
            of_prompt: classes(&self.of_prompt),
            class_of_prompt: classes(&self.class_of_prompt),
            groups: Groups::default(),
            ..self.clone()
        }
    }

    /// The prompts of the first round: those of classes and groups that are in no group.
    pub fn first(&self) -> Vec<PromptIndex> {
        if self.has_hierarchy() {
            self.groups.top.clone()
        } else {
            (0..self.of_prompt.len() as u32).map(PromptIndex).collect()
        }
    }

    /// Whether there are any groups.
    pub fn has_hierarchy(&self) -> bool {
        !self.groups.below.is_empty()
    }

    /// Whether a prompt belongs to a group, so that it can't predict a class.
    pub fn is_group(&self, prompt: PromptIndex) -> bool {
        prompt.at() >= self.class_prompts
    }

    /// Whether any of these prompts belongs to a group.
    pub fn have_groups(&self, prompts: &[PromptIndex]) -> bool {
        prompts.iter().any(|prompt| self.is_group(*prompt))
    }

    /// The prompts, with each group's replaced by those of its members; ascending.
    pub fn opened(&self, prompts: &[PromptIndex]) -> Vec<PromptIndex> {
        let opened = |prompt: &PromptIndex| match prompt.at().checked_sub(self.class_prompts) {
            Some(group) => self.groups.below[group].clone(),
            None => vec![*prompt],
        };
        prompts.iter().flat_map(opened).collect::<BTreeSet<_>>().into_iter().collect()
    }

    /// The prompts of all classes.
    pub fn of_all_classes(&self) -> impl Iterator<Item = PromptIndex> + use<> {
        (0..self.class_prompts as u32).map(PromptIndex)
    }

    /// Whether the prompts belong to more than one class.
    pub fn are_rivals(&self, prompts: &[PromptIndex]) -> bool {
        prompts.windows(2).any(|pair| self.class_of(pair[0]) != self.class_of(pair[1]))
    }

    /// Whether two prompts may be compared: they belong to different classes or groups, and neither is inside the other.
    pub fn may_be_compared(&self, one: PromptIndex, other: PromptIndex) -> bool {
        self.are_rivals(&[one, other]) && !self.is_below(one, other) && !self.is_below(other, one)
    }

    /// Whether a prompt belongs to a member of another prompt's group.
    fn is_below(&self, member: PromptIndex, group: PromptIndex) -> bool {
        let mut level = vec![group];
        while self.have_groups(&level) {
            level = self.opened(&level);
            if level.contains(&member) {
                return true;
            }
        }
        false
    }

    /// The number of contenders.
    pub fn len(&self) -> usize {
        self.count
    }

    /// Whether there are no contenders.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// The total number of prompts.
    pub fn prompt_count(&self) -> usize {
        self.of_prompt.len()
    }

    /// The number of a prompt's contender.
    pub fn of_prompt(&self, prompt: PromptIndex) -> u32 {
        self.of_prompt[prompt.at()]
    }

    /// The number of a prompt's class.
    pub fn class_of(&self, prompt: PromptIndex) -> u32 {
        self.class_of_prompt[prompt.at()]
    }

    /// The plural noun for contenders: `prompts` or `classes`.
    pub fn noun(&self) -> &'static str {
        match self.ensemble {
            PromptEnsemble::Max => "prompts",
            PromptEnsemble::Mean => "classes",
        }
    }

    /// Whether all contenders have equally many prompts. If so, the cost of a round does not depend on which ones stay.
    pub fn are_even(&self) -> bool {
        self.sizes().windows(2).all(|pair| pair[0] == pair[1])
    }

    /// The most prompts that any `keep` contenders can have.
    pub fn most_prompts(&self, keep: u32) -> u64 {
        self.sizes().iter().take(keep as usize).sum()
    }

    /// The number of prompts of each contender, largest first.
    fn sizes(&self) -> Vec<u64> {
        let mut sizes = vec![0; self.count];
        self.of_prompt[..self.class_prompts].iter().for_each(|contender| sizes[*contender as usize] += 1);
        sizes.sort_unstable_by(|a, b| b.cmp(a));
        sizes
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn all(count: u32) -> Vec<PromptIndex> {
        (0..count).map(PromptIndex).collect()
    }

    /// Class 7 has the prompts 0, 1 and 4; class 2 has 2; class 5 has 3.
    pub(crate) fn uneven(ensemble: PromptEnsemble) -> Contenders {
        let csv = "prompt,classname,classidx\na,cat,7\nb,cat,7\nc,dog,2\nd,owl,5\ne,cat,7\n";
        Contenders::of_classes(&Classes::parse(csv, &[]).unwrap(), ensemble)
    }

    #[test]
    fn groups_stand_above_classes_with_all_their_prompts() {
        let csv = "prompt,classname,classidx\na,husky,7\nb,husky,7\nc,pug,2\nd,car,5\n";
        let classes = Classes::parse(csv, &[]).unwrap();
        let templates = ["a {}", "the {}"].map(str::to_owned);
        let hierarchy = Hierarchy::parse("class,parent\nhusky,dog\npug,dog\n", &classes, &templates).unwrap();
        for ensemble in [PromptEnsemble::Max, PromptEnsemble::Mean] {
            let of_classes = Contenders::of_classes(&classes, ensemble);
            let contenders = of_classes.clone().below(&hierarchy, &classes);
            assert_eq!(contenders.first(), [3, 4, 5].map(PromptIndex));
            assert_eq!(contenders.opened(&[3, 4].map(PromptIndex)), all(4));
            assert_eq!(contenders.opened(&[5].map(PromptIndex)), all(3));
            assert!(
                !contenders.are_rivals(&[4, 5].map(PromptIndex)) && contenders.are_rivals(&[3, 4].map(PromptIndex))
            );
            let compared = |a, b| contenders.may_be_compared(PromptIndex(a), PromptIndex(b));
            assert!(compared(0, 2) && compared(3, 4) && !compared(0, 1) && !compared(1, 4) && !compared(5, 2));
            let together = contenders.of_prompt(PromptIndex(4)) == contenders.of_prompt(PromptIndex(5));
            assert_eq!(together, ensemble == PromptEnsemble::Mean);
            assert_eq!((contenders.prompt_count(), contenders.len()), (6, of_classes.len()));
            assert_eq!(contenders.without_groups(), of_classes);
            // Without groups the first round has every prompt.
            assert_eq!(of_classes.first(), all(4));
        }
    }

    #[test]
    fn most_prompts_counts_the_classes_with_the_most_prompts() {
        let contenders = uneven(PromptEnsemble::Mean);
        assert!(!contenders.are_even());
        assert_eq!((contenders.len(), contenders.prompt_count(), contenders.noun()), (3, 5, "classes"));
        assert_eq!((uneven(PromptEnsemble::Max).len(), uneven(PromptEnsemble::Max).noun()), (5, "prompts"));
        assert_eq!([1, 2, 3].map(|keep| contenders.most_prompts(keep)), [3, 4, 5]);
        assert!(Contenders::prompts(4).are_even());
        assert_eq!(Contenders::prompts(2).most_prompts(5), 2);
    }
}
