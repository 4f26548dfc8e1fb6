//! An image of a dataset, and where it lies.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

use crate::class::Classes;
use crate::ids::SampleId;

/// One image of the dataset.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sample {
    /// Its position in the manifest.
    pub id: SampleId,
    /// Its path relative to the source, which no other sample has.
    pub key: String,
    /// The file a worker reads it from: an absolute local path or a URL.
    pub location: String,
    /// Where in that file it is; none where it is the whole file.
    pub part: Option<Part>,
    /// Size in bytes; 0 where it can't be known without reading it.
    pub size: u64,
    /// The entity tag of the file.
    pub etag: Option<String>,
    /// The label, where the dataset brings one.
    pub label: Option<String>,
    /// Captions of its own, which are its classes; none where it is judged by the job's.
    pub candidates: Vec<String>,
    /// Names the sample with the same captions that it is paired with.
    pub pair: Option<String>,
}

/// An image's place in a file that holds many.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Part {
    /// A member of a tar archive: the sample's size in bytes, from this offset on.
    Member {
        /// The position of its first byte.
        offset: u64,
    },
    /// A cell of a Parquet file.
    Cell {
        /// The row, counted from 0 over the whole file.
        row: u64,
        /// The column; fields of structs after dots, as in `image.bytes`.
        column: String,
    },
}

impl Sample {
    /// The classes it is judged by: its own captions, or else the job's.
    pub fn classes<'a>(&self, of_job: &'a Classes) -> Cow<'a, Classes> {
        match &self.candidates[..] {
            [] => Cow::Borrowed(of_job),
            captions => Cow::Owned(Classes::of_captions(captions)),
        }
    }

    /// Row and column, where it is a cell of a table.
    pub fn cell(&self) -> Option<(u64, &str)> {
        match &self.part {
            Some(Part::Cell { row, column }) => Some((*row, column)),
            _ => None,
        }
    }
}
