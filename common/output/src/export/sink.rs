//! Writes a file to a store in parts.

use bytes::Bytes;
use elbo_store::{Store, StoreError};
use object_store::path::Path;
use object_store::{ObjectStoreExt, WriteMultipart};

use super::ExportError;

/// Parts that are sent concurrently.
const IN_FLIGHT: usize = 4;

/// A file that appears only when it is finished.
#[derive(Debug)]
pub(super) struct Sink {
    upload: WriteMultipart,
    path: Path,
}

impl Sink {
    /// Starts a file.
    pub(super) async fn create(store: &Store, path: Path) -> Result<Self, ExportError> {
        let begun = store.inner().put_multipart(&path).await;
        let upload = begun.map_err(|source| failed(&path, source))?;
        Ok(Self { upload: WriteMultipart::new(upload), path })
    }

    /// Appends bytes.
    pub(super) async fn write(&mut self, bytes: Bytes) -> Result<(), ExportError> {
        self.upload.wait_for_capacity(IN_FLIGHT).await.map_err(|source| failed(&self.path, source))?;
        self.upload.put(bytes);
        Ok(())
    }

    /// Makes the file appear and replaces any existing one.
    pub(super) async fn finish(self) -> Result<(), ExportError> {
        self.upload.finish().await.map(drop).map_err(|source| failed(&self.path, source))
    }

    /// Aborts the upload after another failure. Errors of aborting are ignored, since that failure is reported.
    pub(super) async fn abort(self) {
        let _ = self.upload.abort().await;
    }
}

fn failed(path: &Path, source: object_store::Error) -> ExportError {
    StoreError::Object { action: "writing", path: path.to_string(), source }.into()
}
