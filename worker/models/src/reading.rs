//! Tokenized texts. A model can't distinguish texts with the same tokens, however they are written.

use std::collections::HashMap;

use elbo_core::text::excerpt;

/// A text as a model's text encoders read it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reading {
    /// The encoders' input: the same number of ids for every text.
    ids: Vec<u32>,
    /// Number of tokens in the text.
    tokens: usize,
    /// Maximum number of tokens that can be read.
    room: usize,
}

/// Two texts that should differ but are the same to a model.
#[derive(Debug, thiserror::Error)]
#[error(
    "{first} and {second} are the same tokens to the model's text encoder, which can't distinguish them: {}",
    remedy(*.room)
)]
pub struct SameTokens {
    first: String,
    second: String,
    /// Maximum number of tokens that can be read, if one of the texts has more.
    room: Option<usize>,
}

fn remedy(room: Option<usize>) -> String {
    match room {
        Some(room) => {
            format!("it reads only the first {room} tokens of a text, so shorten the texts or make them differ earlier")
        }
        None => {
            "it does not see differences of case, of blanks and, in some models, of punctuation or of letters that it \
                 has no tokens for, so let them differ in their words"
                .to_owned()
        }
    }
}

impl Reading {
    /// The `ids` of a text with this many `tokens`, of which up to `room` can be read.
    pub(crate) fn new(ids: Vec<u32>, tokens: usize, room: usize) -> Self {
        Self { ids, tokens, room }
    }

    /// The encoder's input.
    pub fn into_ids(self) -> Vec<u32> {
        self.ids
    }

    /// Whether the end of the text is cut off.
    pub fn is_cut(&self) -> bool {
        self.tokens > self.room
    }

    /// Combines two encoders' readings of a text. The end counts as read if one of them reads it.
    pub(crate) fn and(mut self, other: Self) -> Self {
        if (!other.is_cut(), other.room) > (!self.is_cut(), self.room) {
            (self.tokens, self.room) = (other.tokens, other.room);
        }
        self.ids.extend(other.ids);
        self
    }
}

/// Refuses two texts with the same tokens if `must_differ` is true for their positions; `shown` names them in the
/// error.
pub fn check_distinct(
    readings: &[Reading],
    must_differ: impl Fn(usize, usize) -> bool,
    shown: impl Fn(usize) -> String,
) -> Result<(), SameTokens> {
    let mut same: HashMap<&[u32], Vec<usize>> = HashMap::new();
    for (second, reading) in readings.iter().enumerate() {
        let before = same.entry(&reading.ids).or_default();
        if let Some(&first) = before.iter().find(|first| must_differ(**first, second)) {
            let cut = [&readings[first], reading].into_iter().find(|reading| reading.is_cut());
            return Err(SameTokens { first: shown(first), second: shown(second), room: cut.map(|cut| cut.room) });
        }
        before.push(second);
    }
    Ok(())
}

/// A warning about texts whose ends are cut off; `None` if there are none.
pub fn cut_off(what: &str, texts: &[String], readings: &[Reading]) -> Option<String> {
    const SHOWN: usize = 3;
    let cut: Vec<_> = texts.iter().zip(readings).filter(|(_, reading)| reading.is_cut()).collect();
    let (_, first) = cut.first()?;
    let shown: Vec<_> = cut.iter().take(SHOWN).map(|(text, _)| format!("'{}'", excerpt(text))).collect();
    Some(format!(
        "{} of the {what} are longer than the {} tokens that the model's text encoder reads, and their ends are ignored: \
         shorten them ({})",
        cut.len(),
        first.room,
        shown.join(", ")
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A text of these tokens, for an encoder that reads three.
    fn reading(tokens: &[u32]) -> Reading {
        let mut ids: Vec<u32> = tokens.iter().take(3).copied().collect();
        ids.resize(3, 0);
        Reading::new(ids, tokens.len(), 3)
    }

    fn check(readings: &[Reading], classes: &[i32]) -> Result<(), String> {
        let shown = |at: usize| format!("prompt {at}");
        check_distinct(readings, |a, b| classes[a] != classes[b], shown).map_err(|error| error.to_string())
    }

    #[test]
    fn prompts_of_two_classes_with_the_same_tokens_are_refused() {
        let readings = [reading(&[1, 2]), reading(&[5, 6, 7, 8]), reading(&[1, 2]), reading(&[5, 6, 7, 9])];
        assert_eq!(check(&readings, &[4, 5, 4, 5]), Ok(()));
        let error = check(&readings, &[4, 5, 4, 6]).unwrap_err();
        assert!(
            error.contains("prompt 1 and prompt 3 are the same tokens") && error.contains("first 3 tokens"),
            "{error}"
        );
        let error = check(&readings, &[4, 5, 3, 5]).unwrap_err();
        assert!(error.contains("prompt 0 and prompt 2") && error.contains("differ in their words"), "{error}");
    }

    #[test]
    fn a_text_is_cut_if_no_encoder_reads_its_end() {
        let (long, short) = (reading(&[1, 2, 3, 4]), Reading::new(vec![9; 8], 4, 8));
        assert!(
            long.is_cut() && !long.clone().and(short.clone()).is_cut() && !short.clone().and(long.clone()).is_cut()
        );
        let both = long.clone().and(Reading::new(vec![9; 2], 4, 2));
        assert_eq!((both.is_cut(), both.room, both.ids.len()), (true, 3, 5));
        // The texts are the same to one encoder but not to the other.
        let readings = [long.clone().and(short.clone()), long.clone().and(Reading::new(vec![8; 8], 4, 8))];
        assert_eq!(check(&readings, &[0, 1]), Ok(()));
        let texts = ["a", "b"].map(str::to_owned);
        assert_eq!(cut_off("prompts", &texts, &[short.clone(), short.clone()]), None);
        let said = cut_off("prompts", &texts, &[short, long]).unwrap();
        assert!(said.starts_with("1 of the prompts are longer than the 3 tokens") && said.ends_with("('b')"), "{said}");
    }
}
