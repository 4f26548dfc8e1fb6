//! An image of a dataset and its location.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

use crate::class::Classes;
use crate::ids::SampleId;

/// One image of the dataset.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sample {
    /// Its position in the manifest.
    pub id: SampleId,
    /// Its path relative to the source, unique in the dataset.
    pub key: String,
    /// The file a worker reads it from: an absolute local path or a URL.
    pub location: String,
    /// Its place in that file; `None` if it is the whole file.
    pub part: Option<Part>,
    /// Size in bytes; 0 if it is unknown until the file is read.
    pub size: u64,
    /// The entity tag of the file.
    pub etag: Option<String>,
    /// The label from the dataset, if it has one.
    pub label: Option<String>,
    /// Its own captions, which are its classes; empty if it uses the job's classes.
    pub candidates: Vec<String>,
    /// The name of the pair: samples with the same captions that share noise.
    pub pair: Option<String>,
}

/// The place of an image in a file that holds many.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Part {
    /// A member of a tar archive, which starts at this offset and has the sample's size.
    Member {
        /// The position of its first byte.
        offset: u64,
    },
    /// A cell in a Parquet file.
    Cell {
        /// The row, counted from 0 over the whole file.
        row: u64,
        /// The column; fields of structs follow after dots, as in `image.bytes`.
        column: String,
    },
}

impl Sample {
    /// The sample's classes: its own captions, or else the job's classes.
    pub fn classes<'a>(&self, of_job: &'a Classes) -> Cow<'a, Classes> {
        match &self.candidates[..] {
            [] => Cow::Borrowed(of_job),
            captions => Cow::Owned(Classes::of_captions(captions)),
        }
    }

    /// Row and column, if it is a cell of a table.
    pub fn cell(&self) -> Option<(u64, &str)> {
        match &self.part {
            Some(Part::Cell { row, column }) => Some((*row, column)),
            _ => None,
        }
    }
}
