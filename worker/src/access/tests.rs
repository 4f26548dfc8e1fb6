//! Tests of failing reads, on a file system and on a store.

use tempfile::TempDir;

use super::*;

fn of_store(source: object_store::Error) -> AtFault {
    let path = "s3://bucket/a.png".to_owned();
    AtFault::of(&StoreError::Object { action: "reading", path, source }.into())
}

fn answer(status: &str, code: &str) -> Box<dyn Error + Send + Sync> {
    format!("Server returned non-2xx status code: {status}: <Error><Code>{code}</Code></Error>").into()
}

#[test]
fn credentials_and_clocks_are_the_workers_fault_and_the_fault_of_missing_keys_is_unknown() {
    let generic = |status, code| object_store::Error::Generic { store: "S3", source: answer(status, code) };
    let denied =
        |code| object_store::Error::PermissionDenied { path: "a".into(), source: answer("403 Forbidden", code) };
    assert_eq!(of_store(generic("400 Bad Request", "ExpiredToken")), AtFault::Access);
    assert_eq!(of_store(generic("400 Bad Request", "InvalidToken")), AtFault::Access);
    assert_eq!(of_store(denied("RequestTimeTooSkewed")), AtFault::Access);
    assert_eq!(of_store(denied("InvalidAccessKeyId")), AtFault::Access);
    assert_eq!(of_store(generic("400 Bad Request", "TokenRefreshRequired")), AtFault::Access);
    assert_eq!(of_store(denied("AuthenticationFailed")), AtFault::Access);
    assert_eq!(of_store(denied("AccountIsDisabled")), AtFault::Access);
    assert_eq!(of_store(denied("AccessDenied")), AtFault::Unknown);
    // A web server may want a password for one of its files, and a store's answer to HEAD has no code.
    let nobody =
        |code| object_store::Error::Unauthenticated { path: "a".into(), source: answer("401 Unauthorized", code) };
    assert_eq!(of_store(nobody("")), AtFault::Unknown);
    assert_eq!(of_store(nobody("AuthenticationRequired")), AtFault::Access);
    assert_eq!(of_store(generic("407 Proxy Authentication Required", "")), AtFault::Access);
    for passing in ["502 Bad Gateway", "503 Service Unavailable", "504 Gateway Timeout"] {
        let page = format!("Server returned non-2xx status code: {passing}: <html><h1>{passing}</h1></html>");
        assert_eq!(of_store(object_store::Error::Generic { store: "HTTP", source: page.into() }), AtFault::Storage);
    }
    let missing = object_store::Error::NotFound { path: "a".into(), source: answer("404 Not Found", "NoSuchKey") };
    assert_eq!(of_store(missing), AtFault::Unknown);
    assert_eq!(of_store(generic("503 Slow Down", "SlowDown")), AtFault::Storage);
    let settings = StoreError::Settings { location: "s3://bucket".into(), reason: "half a key".into() };
    assert_eq!(AtFault::of(&settings.into()), AtFault::Access);
}

#[test]
fn failing_file_systems_are_the_workers_fault_and_missing_files_are_not() {
    let local = |error: std::io::Error| {
        of_store(object_store::Error::Generic { store: "LocalFileSystem", source: error.into() })
    };
    // EIO, ESTALE, ENOTCONN, ECONNABORTED, ECONNRESET, EHOSTDOWN and EREMOTEIO as Linux numbers them.
    for code in [5, 116, 107, 103, 104, 112, 121] {
        assert_eq!(local(std::io::Error::from_raw_os_error(code)), AtFault::Access, "{code}");
    }
    // EISDIR, ENOTDIR, ENAMETOOLONG.
    for code in [21, 20, 36] {
        assert_eq!(local(std::io::Error::from_raw_os_error(code)), AtFault::Unknown, "{code}");
    }
    let missing = std::io::Error::from(ErrorKind::NotFound);
    assert_eq!(of_store(object_store::Error::NotFound { path: "a".into(), source: missing.into() }), AtFault::Unknown);
}

#[test]
fn changed_too_large_or_empty_images_are_at_fault_themselves() {
    assert_eq!(AtFault::of(&ReadError::Changed { file: "a".into() }), AtFault::Image);
    assert_eq!(AtFault::of(&ReadError::TooLarge { size: 2, limit: 1 }), AtFault::Image);
    assert_eq!(AtFault::of(&ReadError::Cell { file: "a".into(), row: 0, problem: "empty".into() }), AtFault::Image);
}

/// A directory with some images, and access to them, with all as witnesses.
fn images(names: &[&str]) -> (TempDir, Vec<Image>, Access) {
    let root = TempDir::new().unwrap();
    let path = |name: &&str| root.path().join(name).to_string_lossy().into_owned();
    names.iter().for_each(|name| std::fs::write(path(name), b"pixels").unwrap());
    let image = |name| Image { location: path(name), part: None, size: 0, etag: None };
    let images: Vec<_> = names.iter().map(image).collect();
    let access = Access::new(root.path().to_string_lossy().into_owned(), images.clone(), Arc::default());
    (root, images, access)
}

/// The stage at which an image failed.
fn blamed(read: Result<Bytes, Unread>) -> FailureStage {
    match read {
        Err(Unread::Image { stage, .. }) => stage,
        other => panic!("{other:?}"),
    }
}

/// The error of a worker that can't read any image.
fn lost(read: Result<Bytes, Unread>) -> String {
    match read {
        Err(Unread::Access(error)) => error.to_string(),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_missing_image_is_reported_if_others_can_be_read_in_any_order() {
    let (_root, images, access) = images(&["a", "b", "c", "d"]);
    for gone in &images[..3] {
        std::fs::remove_file(&gone.location).unwrap();
    }
    let reader = Reader::new();
    // Several fail in a row, and none was read before.
    for gone in &images[..3] {
        assert_eq!(blamed(access.read(&reader, gone).await), FailureStage::Unread);
    }
    assert_eq!(&access.read(&reader, &images[3]).await.unwrap()[..], b"pixels");
    // An image that was readable before may not be readable now.
    std::fs::remove_file(&images[3].location).unwrap();
    let lost = lost(access.read(&reader, &images[0]).await);
    assert!(lost.contains("none of 4 images") && lost.contains("is empty here"), "{lost}");
}

#[tokio::test]
async fn a_worker_without_its_mount_says_so_and_blames_no_image() {
    let (root, images, access) = images(&["a", "b"]);
    let reader = Reader::new();
    assert!(access.read(&reader, &images[0]).await.is_ok());
    std::fs::remove_dir_all(root.path()).unwrap();
    let lost = lost(access.read(&reader, &images[1]).await);
    assert!(lost.contains("there is no") && lost.contains("none of them is blamed"), "{lost}");
}

#[tokio::test]
async fn a_changed_image_is_blamed_at_once() {
    let (_root, images, access) = images(&["a"]);
    let changed = Image { size: 7, ..images[0].clone() };
    assert_eq!(blamed(access.read(&Reader::new(), &changed).await), FailureStage::Read);
}

#[test]
fn the_directory_of_a_source_is_the_part_before_wildcards() {
    let of = |source: &str| directory_of(source).map(|path| path.to_string_lossy().into_owned());
    assert_eq!(of("/no/such/photos").as_deref(), Some("/no/such/photos"));
    assert_eq!(of("/no/such/{a,b}/*.png").as_deref(), Some("/no/such/"));
    assert_eq!(of("s3://bucket/photos"), None);
}
