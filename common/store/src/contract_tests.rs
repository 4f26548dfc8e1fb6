//! What [`object_store`] expects of a store, asked of every store and wrapper here.

use std::sync::Arc;

use object_store::integration::{
    copy_if_not_exists, copy_rename_nonexistent_object, get_nonexistent_object, get_opts,
    list_uses_directories_correctly, list_with_delimiter, list_with_offset_exclusivity, put_get_attributes,
    put_get_delete_list, put_opts, rename_and_copy, stream_get,
};
use object_store::memory::InMemory;
use object_store::prefix::PrefixStore;
use object_store::{Error, ObjectStore};
use tempfile::TempDir;

use super::listing::SteadyListing;
use super::local::Directory;
use super::pace::{Pace, Paced};

/// Runs the suite on an empty store.
async fn keeps_the_contract(store: &dyn ObjectStore) {
    put_get_delete_list(store).await;
    list_with_offset_exclusivity(store).await;
    get_opts(store).await;
    list_uses_directories_correctly(store).await;
    list_with_delimiter(store).await;
    rename_and_copy(store).await;
    copy_if_not_exists(store).await;
    copy_rename_nonexistent_object(store).await;
    stream_get(store).await;
    // Leaves objects behind, so nothing that lists comes after it.
    put_opts(store, true).await;
    let missing = get_nonexistent_object(store, None).await.unwrap_err();
    assert!(matches!(missing, Error::NotFound { .. }), "{missing}");
}

#[tokio::test]
async fn a_directory_keeps_the_contract() {
    let directory = TempDir::new().unwrap();
    keeps_the_contract(&Directory::open(directory.path()).unwrap()).await;
}

#[tokio::test]
async fn a_store_with_steady_listings_keeps_the_contract() {
    let store = SteadyListing(Arc::new(InMemory::new()));
    keeps_the_contract(&store).await;
    put_get_attributes(&store).await;
}

#[tokio::test]
async fn a_paced_store_keeps_the_contract() {
    let store = Paced::new(Arc::new(InMemory::new()), Pace::REMOTE);
    keeps_the_contract(&store).await;
    put_get_attributes(&store).await;
}

#[tokio::test]
async fn a_paced_directory_keeps_the_contract() {
    let directory = TempDir::new().unwrap();
    keeps_the_contract(&Paced::new(Arc::new(Directory::open(directory.path()).unwrap()), Pace::LOCAL)).await;
}

#[tokio::test]
async fn a_remote_store_keeps_the_contract() {
    // As a URL is opened.
    let store = SteadyListing(Arc::new(PrefixStore::new(InMemory::new(), "a/prefix")));
    let store = Paced::new(Arc::new(store), Pace::REMOTE);
    keeps_the_contract(&store).await;
    put_get_attributes(&store).await;
}
