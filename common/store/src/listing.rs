//! Listings that resume where they broke off.
//!
//! A listing of a million keys takes a thousand requests. The clients of [`object_store`] repeat a refused request, but not one
//! whose response breaks off; then the whole listing fails.

use std::fmt;
use std::iter::Take;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use backon::ExponentialBackoff;
use futures::StreamExt;
use futures::stream::{self, BoxStream};
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore, PutMultipartOptions,
    PutOptions, PutPayload, PutResult, RenameOptions, Result,
};

use super::retry;
use super::transient::is_transient;

/// Consecutive failures after which a listing is given up.
const FAILURES: usize = 6;

/// A store that lists keys in ascending order, and whose listings survive transient failures.
#[derive(Debug)]
pub(super) struct SteadyListing<T>(pub(super) Arc<T>);

impl<T: fmt::Display> fmt::Display for SteadyListing<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl<T: ObjectStore> ObjectStore for SteadyListing<T> {
    async fn put_opts(&self, path: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        self.0.put_opts(path, payload, options).await
    }

    async fn put_multipart_opts(&self, path: &Path, options: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        self.0.put_multipart_opts(path, options).await
    }

    async fn get_opts(&self, path: &Path, options: GetOptions) -> Result<GetResult> {
        self.0.get_opts(path, options).await
    }

    async fn get_ranges(&self, path: &Path, ranges: &[std::ops::Range<u64>]) -> Result<Vec<bytes::Bytes>> {
        self.0.get_ranges(path, ranges).await
    }

    fn delete_stream(&self, paths: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        self.0.delete_stream(paths)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        let (inner, prefix) = (Arc::clone(&self.0), prefix.cloned());
        steady(None, move |last| match last {
            None => inner.list(prefix.as_ref()),
            Some(last) => inner.list_with_offset(prefix.as_ref(), last),
        })
    }

    fn list_with_offset(&self, prefix: Option<&Path>, offset: &Path) -> BoxStream<'static, Result<ObjectMeta>> {
        let (inner, prefix, offset) = (Arc::clone(&self.0), prefix.cloned(), offset.clone());
        steady(Some(offset.clone()), move |last| inner.list_with_offset(prefix.as_ref(), last.unwrap_or(&offset)))
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.0.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.0.copy_opts(from, to, options).await
    }

    async fn rename_opts(&self, from: &Path, to: &Path, options: RenameOptions) -> Result<()> {
        self.0.rename_opts(from, to, options).await
    }
}

type Listed = BoxStream<'static, Result<ObjectMeta>>;

/// Streams what `open` lists after a key. If the stream breaks off, it is opened again after the last key.
fn steady<F>(from: Option<Path>, open: F) -> Listed
where
    F: Fn(Option<&Path>) -> Listed + Send + 'static,
{
    let listed = open(from.as_ref());
    let listing = Listing { open, listed, last: from, pauses: pauses() };
    let next = |listing: Option<Listing<F>>| async {
        let mut listing = listing?;
        let item = listing.next().await?;
        let rest = item.is_ok().then_some(listing);
        Some((item, rest))
    };
    stream::unfold(Some(listing), next).boxed()
}

struct Listing<F> {
    open: F,
    listed: Listed,
    last: Option<Path>,
    pauses: Take<ExponentialBackoff>,
}

/// The pauses before each attempt to reopen a listing.
fn pauses() -> Take<ExponentialBackoff> {
    retry::pauses(Duration::from_millis(50)).take(FAILURES)
}

impl<F: Fn(Option<&Path>) -> Listed> Listing<F> {
    async fn next(&mut self) -> Option<Result<ObjectMeta>> {
        loop {
            match self.listed.next().await? {
                Ok(meta) => {
                    self.last = Some(meta.location.clone());
                    self.pauses = pauses();
                    return Some(Ok(meta));
                }
                Err(error) => {
                    let Some(pause) = self.pauses.next().filter(|_| is_transient(&error)) else {
                        return Some(Err(error));
                    };
                    tokio::time::sleep(pause).await;
                    self.listed = (self.open)(self.last.as_ref());
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::TryStreamExt;
    use object_store::Error;

    use super::*;

    fn meta(key: usize) -> ObjectMeta {
        let location = Path::from(format!("{key:02}"));
        ObjectMeta { location, last_modified: Default::default(), size: 1, e_tag: None, version: None }
    }

    /// Lists three keys after `last`. If more follow, it then fails with `fail`.
    fn three(last: Option<&Path>, fail: fn() -> Error) -> Listed {
        let after: Vec<_> = (0..10).map(meta).filter(|m| last.is_none_or(|last| m.location > *last)).collect();
        let failure = (after.len() > 3).then(|| Err(fail()));
        stream::iter(after.into_iter().take(3).map(Ok).chain(failure)).boxed()
    }

    #[tokio::test]
    async fn a_listing_that_breaks_off_resumes_after_the_last_key() {
        let broken = || Error::Generic { store: "S3", source: "the body broke off".into() };
        let all: Vec<_> = steady(None, move |last| three(last, broken)).try_collect().await.unwrap();
        assert_eq!(all, (0..10).map(meta).collect::<Vec<_>>());
        let from = Path::from("05");
        let rest: Vec<_> = steady(Some(from), move |last| three(last, broken)).try_collect().await.unwrap();
        assert_eq!(rest, (6..10).map(meta).collect::<Vec<_>>());
    }

    #[tokio::test]
    async fn a_listing_fails_with_a_permanent_error() {
        let denied = || Error::PermissionDenied { path: "a".into(), source: "403".into() };
        let listed: Vec<_> = steady(None, move |last| three(last, denied)).collect().await;
        assert_eq!((listed.len(), listed[3].is_err()), (4, true));
        let away = || Error::Generic { store: "S3", source: "connection refused".into() };
        let never = steady(None, move |_| stream::iter([Err(away())]).boxed()).collect::<Vec<_>>().await;
        assert!(matches!(never[..], [Err(_)]));
    }
}
