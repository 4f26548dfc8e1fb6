//! What is made of failing reads, on a file system and on a store.

use tempfile::TempDir;

use super::*;

fn of_store(source: object_store::Error) -> Fault {
    let path = "s3://bucket/a.png".to_owned();
    Fault::of(&StoreError::Object { action: "reading", path, source }.into())
}

fn answer(status: &str, code: &str) -> Box<dyn Error + Send + Sync> {
    format!("Server returned non-2xx status code: {status}: <Error><Code>{code}</Code></Error>").into()
}

#[test]
fn credentials_and_clocks_are_the_workers_fault_and_single_keys_are_nobodys_yet() {
    let generic = |status, code| object_store::Error::Generic { store: "S3", source: answer(status, code) };
    let denied =
        |code| object_store::Error::PermissionDenied { path: "a".into(), source: answer("403 Forbidden", code) };
    assert_eq!(of_store(generic("400 Bad Request", "ExpiredToken")), Fault::Access);
    assert_eq!(of_store(generic("400 Bad Request", "InvalidToken")), Fault::Access);
    assert_eq!(of_store(denied("RequestTimeTooSkewed")), Fault::Access);
    assert_eq!(of_store(denied("InvalidAccessKeyId")), Fault::Access);
    assert_eq!(of_store(generic("400 Bad Request", "TokenRefreshRequired")), Fault::Access);
    assert_eq!(of_store(denied("AuthenticationFailed")), Fault::Access);
    assert_eq!(of_store(denied("AccountIsDisabled")), Fault::Access);
    assert_eq!(of_store(denied("AccessDenied")), Fault::Unknown);
    // A web server may want a password for one of its files, and a store's answer to HEAD has no code.
    let nobody =
        |code| object_store::Error::Unauthenticated { path: "a".into(), source: answer("401 Unauthorized", code) };
    assert_eq!(of_store(nobody("")), Fault::Unknown);
    assert_eq!(of_store(nobody("AuthenticationRequired")), Fault::Access);
    assert_eq!(of_store(generic("407 Proxy Authentication Required", "")), Fault::Access);
    for passing in ["502 Bad Gateway", "503 Service Unavailable", "504 Gateway Timeout"] {
        let page = format!("Server returned non-2xx status code: {passing}: <html><h1>{passing}</h1></html>");
        assert_eq!(of_store(object_store::Error::Generic { store: "HTTP", source: page.into() }), Fault::Storage);
    }
    let missing = object_store::Error::NotFound { path: "a".into(), source: answer("404 Not Found", "NoSuchKey") };
    assert_eq!(of_store(missing), Fault::Unknown);
    assert_eq!(of_store(generic("503 Slow Down", "SlowDown")), Fault::Storage);
    let settings = StoreError::Settings { location: "s3://bucket".into(), reason: "half a key".into() };
    assert_eq!(Fault::of(&settings.into()), Fault::Access);
}

#[test]
fn file_systems_that_fail_are_the_workers_fault_and_files_that_are_not_there_are_not() {
    let local = |error: std::io::Error| {
        of_store(object_store::Error::Generic { store: "LocalFileSystem", source: error.into() })
    };
    // EIO, ESTALE, ENOTCONN, ECONNABORTED, ECONNRESET, EHOSTDOWN and EREMOTEIO as Linux numbers them.
    for code in [5, 116, 107, 103, 104, 112, 121] {
        assert_eq!(local(std::io::Error::from_raw_os_error(code)), Fault::Access, "{code}");
    }
    // EISDIR, ENOTDIR, ENAMETOOLONG.
    for code in [21, 20, 36] {
        assert_eq!(local(std::io::Error::from_raw_os_error(code)), Fault::Unknown, "{code}");
    }
    let missing = std::io::Error::from(ErrorKind::NotFound);
    assert_eq!(of_store(object_store::Error::NotFound { path: "a".into(), source: missing.into() }), Fault::Unknown);
}

#[test]
fn what_was_found_and_is_no_image_of_the_job_is_the_images_own_fault() {
    assert_eq!(Fault::of(&ReadError::Changed { file: "a".into() }), Fault::Image);
    assert_eq!(Fault::of(&ReadError::TooLarge { size: 2, limit: 1 }), Fault::Image);
    assert_eq!(Fault::of(&ReadError::Cell { file: "a".into(), row: 0, problem: "empty".into() }), Fault::Image);
}

/// A directory with some images, and access to them by way of all as witnesses.
fn images(names: &[&str]) -> (TempDir, Vec<Image>, Access) {
    let root = TempDir::new().unwrap();
    let path = |name: &&str| root.path().join(name).to_string_lossy().into_owned();
    names.iter().for_each(|name| std::fs::write(path(name), b"pixels").unwrap());
    let image = |name| Image { location: path(name), part: None, size: 0, etag: None };
    let images: Vec<_> = names.iter().map(image).collect();
    let access = Access::new(root.path().to_string_lossy().into_owned(), images.clone(), Arc::default());
    (root, images, access)
}

#[tokio::test]
async fn a_missing_image_is_reported_while_others_can_be_read_whichever_comes_first() {
    let (_root, images, access) = images(&["a", "b", "c", "d"]);
    for gone in &images[..3] {
        std::fs::remove_file(&gone.location).unwrap();
    }
    let reader = Reader::new();
    // More in a row than any streak could allow, and nothing was read before.
    for gone in &images[..3] {
        let unread = access.read(&reader, gone).await.unwrap().unwrap_err();
        assert_eq!(unread.stage, "unread");
    }
    assert_eq!(&access.read(&reader, &images[3]).await.unwrap().unwrap()[..], b"pixels");
    // What was readable once says nothing of now.
    std::fs::remove_file(&images[3].location).unwrap();
    let lost = access.read(&reader, &images[0]).await.unwrap_err().to_string();
    assert!(lost.contains("none of 4 images") && lost.contains("is empty here"), "{lost}");
}

#[tokio::test]
async fn without_its_mount_a_worker_says_so_and_blames_nothing() {
    let (root, images, access) = images(&["a", "b"]);
    let reader = Reader::new();
    assert!(access.read(&reader, &images[0]).await.unwrap().is_ok());
    std::fs::remove_dir_all(root.path()).unwrap();
    let lost = access.read(&reader, &images[1]).await.unwrap_err().to_string();
    assert!(lost.contains("there is no") && lost.contains("none of them is blamed"), "{lost}");
}

#[tokio::test]
async fn an_image_that_has_changed_is_blamed_at_once() {
    let (_root, images, access) = images(&["a"]);
    let changed = Image { size: 7, ..images[0].clone() };
    assert_eq!(access.read(&Reader::new(), &changed).await.unwrap().unwrap_err().stage, "read");
}

#[test]
fn the_directory_of_a_source_is_what_comes_before_wildcards() {
    let of = |source: &str| directory_of(source).map(|path| path.to_string_lossy().into_owned());
    assert_eq!(of("/no/such/photos").as_deref(), Some("/no/such/photos"));
    assert_eq!(of("/no/such/{a,b}/*.png").as_deref(), Some("/no/such/"));
    assert_eq!(of("s3://bucket/photos"), None);
}
