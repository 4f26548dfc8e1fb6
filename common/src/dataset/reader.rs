//! Reading one image, wherever it lies.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use bytes::Bytes;
use object_store::path::Path;
use object_store::{ObjectMeta, ObjectStoreExt, ObjectStoreScheme};
use url::Url;

use crate::store::{Location, Store, StoreError};

/// Reads images by their [`location`](crate::manifest::Sample::location), keeping one store per bucket: a store holds the
/// connections and credentials, which are too dear to make for every image.
#[derive(Debug, Default)]
pub struct Reader {
    stores: Mutex<HashMap<Url, Store>>,
}

impl Reader {
    /// A reader without open stores.
    pub fn new() -> Self {
        Self::default()
    }

    /// Reads a whole image. Where there is none, the error's source is [`object_store::Error::NotFound`].
    pub async fn read(&self, location: &str) -> Result<Bytes, StoreError> {
        let failed = |source| StoreError::Object { action: "reading", path: location.to_owned(), source };
        match Location::parse(location)? {
            Location::Local(path) => read_local(path).await.map_err(failed),
            Location::Remote(url) => {
                let (root, path) = split(&url).map_err(failed)?;
                let object = self.store(root)?.inner().get(&path).await.map_err(failed)?;
                object.bytes().await.map_err(failed)
            }
        }
    }

    /// Size and tag of an image that is on a store, without reading it.
    pub(super) async fn head(&self, url: &str) -> Result<ObjectMeta, StoreError> {
        let failed = |source| StoreError::Object { action: "asking for", path: url.to_owned(), source };
        let generic = |e: url::ParseError| failed(object_store::Error::Generic { store: "URL", source: e.into() });
        let (root, path) = split(&Url::parse(url).map_err(generic)?).map_err(failed)?;
        self.store(root)?.inner().head(&path).await.map_err(failed)
    }

    fn store(&self, root: Url) -> Result<Store, StoreError> {
        let mut stores = self.stores.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(store) = stores.get(&root) {
            return Ok(store.clone());
        }
        let store = Store::open(&Location::Remote(root.clone()))?;
        stores.insert(root, store.clone());
        Ok(store)
    }
}

/// Reads one image by its location; a [`Reader`] is better for many.
pub async fn read_object(location: &str) -> Result<Bytes, StoreError> {
    Reader::new().read(location).await
}

async fn read_local(path: PathBuf) -> Result<Bytes, object_store::Error> {
    let name = path.display().to_string();
    tokio::task::spawn_blocking(move || std::fs::read(path)).await?.map(Bytes::from).map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => object_store::Error::NotFound { path: name, source: e.into() },
        std::io::ErrorKind::PermissionDenied => object_store::Error::PermissionDenied { path: name, source: e.into() },
        _ => object_store::Error::Generic { store: "local file", source: e.into() },
    })
}

/// The URL of the bucket and the object's path in it.
fn split(url: &Url) -> Result<(Url, Path), object_store::Error> {
    let (_, path) = ObjectStoreScheme::parse(url)?;
    let mut root = url.clone();
    if let Ok(mut segments) = root.path_segments_mut() {
        for _ in path.parts() {
            segments.pop();
        }
    }
    Ok((root, path))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(url: &str) -> (String, String) {
        let (root, path) = split(&Url::parse(url).unwrap()).unwrap();
        (root.to_string(), path.to_string())
    }

    #[test]
    fn a_url_is_a_bucket_and_a_path_in_it() {
        assert_eq!(parts("s3://bucket/a/b%20c.png"), ("s3://bucket/".into(), "a/b c.png".into()));
        let path_style = "https://s3.eu-west-1.amazonaws.com/bucket/a/b.png";
        assert_eq!(parts(path_style), ("https://s3.eu-west-1.amazonaws.com/bucket".into(), "a/b.png".into()));
        assert_eq!(
            parts("abfss://container@account.dfs.core.windows.net/a.png"),
            ("abfss://container@account.dfs.core.windows.net/".into(), "a.png".into())
        );
        assert_eq!(parts("http://host:8080/data/a.png"), ("http://host:8080/".into(), "data/a.png".into()));
    }

    #[tokio::test]
    async fn a_missing_image_is_not_found_and_named() {
        let error = read_object("/no/such/image.png").await.unwrap_err();
        assert!(error.to_string().contains("/no/such/image.png"));
        assert!(matches!(error, StoreError::Object { source: object_store::Error::NotFound { .. }, .. }));
    }

    #[tokio::test]
    async fn stores_are_opened_once_per_bucket() {
        let reader = Reader::new();
        for key in ["a", "b"] {
            let _ = reader.read(&format!("memory:///{key}.png")).await;
        }
        assert_eq!(reader.stores.lock().unwrap().len(), 1);
    }
}
