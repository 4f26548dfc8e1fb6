//! Makes numbered and labelled samples of the found images, and refuses duplicate keys.

use std::collections::HashSet;

use elbo_core::ids::SampleId;
use elbo_core::sample::{Part, Sample};

use super::label::{Labels, Unmatched};
use super::{Account, DatasetError, ListOptions, Listed, Reason, caption_of};

/// An image that was found, before it is numbered and labelled.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// Its path relative to the source.
    pub key: String,
    /// The image file, or the file that contains it.
    pub location: String,
    /// The position in that file.
    pub part: Option<Part>,
    /// Size in bytes.
    pub size: u64,
    /// The file's entity tag.
    pub etag: Option<String>,
    /// The label from the source.
    pub label: Option<String>,
    /// Its own captions.
    pub candidates: Vec<String>,
    /// The name of its pair.
    pub pair: Option<String>,
}

/// A sink for the samples of a listing, in order.
pub trait SampleSink: Send {
    /// Takes the next sample.
    fn take(&mut self, sample: Sample) -> Result<(), DatasetError>;

    /// Removes all samples, because the listing starts again.
    fn clear(&mut self);
}

impl SampleSink for Vec<Sample> {
    fn take(&mut self, sample: Sample) -> Result<(), DatasetError> {
        self.push(sample);
        Ok(())
    }

    fn clear(&mut self) {
        Self::clear(self);
    }
}

/// Makes samples of the found images.
pub(super) struct Collector<'a> {
    labels: Option<Labels>,
    limit: u64,
    taken: u64,
    first_key: String,
    /// Hashes of all keys, 16 bytes per sample, if keys may come in any order.
    keys: Option<HashSet<u128>>,
    passed_over: Account,
    sink: &'a mut dyn SampleSink,
}

impl<'a> Collector<'a> {
    pub(super) fn new(options: &ListOptions<'_>, sink: &'a mut dyn SampleSink) -> Result<Self, DatasetError> {
        Ok(Self {
            labels: options.label_from.and_then(|from| from.open().transpose()).transpose()?,
            limit: options.limit.unwrap_or(u64::MAX),
            taken: 0,
            first_key: String::new(),
            keys: None,
            passed_over: Account::default(),
            sink,
        })
    }

    /// Checks for duplicates from here on: keys may come in any order, and more than once by mistake.
    pub(super) fn expect_duplicates(&mut self) {
        self.keys.get_or_insert_default();
    }

    /// Whether the limit is reached.
    pub(super) fn is_full(&self) -> bool {
        self.taken >= self.limit
    }

    /// Removes all samples.
    pub(super) fn clear(&mut self) {
        self.taken = 0;
        if let Some(keys) = &mut self.keys {
            keys.clear();
        }
        if let Some(labels) = &mut self.labels {
            labels.clear();
        }
        self.passed_over.clear();
        self.sink.clear();
    }

    /// Adds an account of items that are not samples.
    pub(super) fn pass_over(&mut self, what: Account) {
        self.passed_over.merge(what);
    }

    /// Adds one item that is not a sample.
    pub(super) fn note(&mut self, reason: Reason, example: &str) {
        self.passed_over.note(reason, example);
    }

    /// Adds several items that are not samples.
    pub(super) fn add_to_account(&mut self, reason: Reason, count: u64, examples: Vec<String>) {
        self.passed_over.add(reason, count, examples);
    }

    /// Takes the account of what was passed over so far.
    pub(super) fn take_account(&mut self) -> Account {
        std::mem::take(&mut self.passed_over)
    }

    /// Takes an image; returns whether more are wanted.
    pub(super) fn add(&mut self, found: Found) -> Result<bool, DatasetError> {
        if self.is_full() {
            return Ok(false);
        }
        let Found { key, location, part, size, etag, label, candidates, pair } = found;
        if let Some(keys) = &mut self.keys {
            let mut hash = [0; 16];
            blake3::Hasher::new().update(key.as_bytes()).finalize_xof().fill(&mut hash);
            if !keys.insert(u128::from_le_bytes(hash)) {
                return Err(DatasetError::Duplicate { key, second: location });
            }
        }
        let label = match &mut self.labels {
            Some(labels) => labels.of(&key),
            None => label,
        };
        let label = label.map(|label| caption_of(&candidates, label)).transpose();
        let label = label.map_err(|label| DatasetError::NotACaption { key: key.clone(), label })?;
        if self.taken == 0 {
            self.first_key.clone_from(&key);
        }
        let id = SampleId(self.taken);
        self.taken += 1;
        self.sink.take(Sample { id, key, location, part, size, etag, label, candidates, pair })?;
        Ok(!self.is_full())
    }

    /// Checks the labels and returns the result.
    pub(super) fn finish(mut self) -> Result<Listed, DatasetError> {
        if let Some(labels) = &self.labels {
            labels.check_rows()?;
        }
        if let Some(labels) = &self.labels
            && !self.is_full()
        {
            labels.check_used(&self.first_key)?;
            let Unmatched { count, examples } = labels.unmatched_rows();
            if count > 0 {
                self.passed_over.add(Reason::UnmatchedLabel, count, examples);
            }
        }
        Ok(Listed { samples: self.taken, passed_over: self.passed_over })
    }
}
