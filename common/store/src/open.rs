//! Opens a URL with the client for its kind of storage, configured by the environment.

use std::sync::Arc;
use std::time::Duration;

use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};
use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey};
use object_store::http::HttpBuilder;
use object_store::memory::InMemory;
use object_store::prefix::PrefixStore;
use object_store::{BackoffConfig, ClientConfigKey, ClientOptions, ObjectStore, ObjectStoreScheme, RetryConfig};
use url::{Position, Url};

use super::credentials::{self, Environment};
use super::keys::{PathsOnly, Skipped};
use super::listing::SteadyListing;
use super::pace::{CONNECT_TIMEOUT, Pace, Paced, READ_TIMEOUT};
use super::redirect::OutwardRedirects;
use super::{Location, StoreError, describe, tls};

/// A client's builder with its settings. Unknown settings belong to other programs and are ignored.
macro_rules! configured {
    ($builder:ty, $url:expr, $settings:expr, $skipped:expr) => {{
        let plain = <$builder>::new().with_url($url.as_str()).with_client_options(client()).with_retry(retries());
        let plain = plain.with_http_connector(PathsOnly(Arc::clone($skipped)));
        let known = $settings.into_iter().filter_map(|(name, value)| Some((name.parse().ok()?, value)));
        known.fold(plain, |builder, (name, value)| builder.with_config(name, value))
    }};
}

/// The store that a URL names, rooted at its path. Keys that its listings pass over are recorded in `skipped`.
pub(super) fn open(url: &Url, skipped: &Arc<Skipped>) -> Result<Arc<dyn ObjectStore>, StoreError> {
    open_in(url, &Environment::of_process(), skipped)
}

fn open_in(url: &Url, environment: &Environment, skipped: &Arc<Skipped>) -> Result<Arc<dyn ObjectStore>, StoreError> {
    tls::use_ring();
    let location = Location::Remote(url.clone()).to_string();
    let unusable = |e: &object_store::Error| StoreError::Location { location: location.clone(), reason: describe(e) };
    let settings = |reason: String| StoreError::Settings { location: location.clone(), reason };
    let (scheme, prefix) = ObjectStoreScheme::parse(url).map_err(|e| unusable(&e.into()))?;
    let of_web_server = matches!(scheme, ObjectStoreScheme::Http);
    if !of_web_server && (url.password().is_some() || url.query().is_some()) {
        return Err(settings(
            "credentials or parameters in its URL would not be used, and would be written to files that others may read: give them in the environment instead"
                .into(),
        ));
    }
    let insecure = |endpoint: Option<String>, allowed: Option<String>, variable: &str| {
        let endpoint = endpoint.filter(|e| e.starts_with("http://"))?;
        let allowed =
            allowed.is_some_and(|value| matches!(&*value.to_ascii_lowercase(), "true" | "1" | "yes" | "y" | "on"));
        let reason = format!(
            "its endpoint {endpoint} is not encrypted: use https://, or set {variable}=true if this is intended"
        );
        (!allowed).then(|| settings(reason))
    };
    let http = ClientConfigKey::AllowHttp;
    let store: Box<dyn ObjectStore> = match scheme {
        ObjectStoreScheme::AmazonS3 => {
            let (options, fetched) = credentials::s3(environment).map_err(settings)?;
            let builder = configured!(AmazonS3Builder, url, options, skipped);
            let builder = match fetched {
                Some(keys) => builder.with_credentials(keys),
                None => builder,
            };
            let endpoint = [AmazonS3ConfigKey::S3Endpoint, AmazonS3ConfigKey::Endpoint];
            let endpoint = endpoint.iter().find_map(|key| builder.get_config_value(key));
            let allowed = builder.get_config_value(&AmazonS3ConfigKey::Client(http));
            insecure(endpoint, allowed, "AWS_ALLOW_HTTP").map_or(Ok(()), Err)?;
            Box::new(builder.build().map_err(|e| settings(describe(&e)))?)
        }
        ObjectStoreScheme::MicrosoftAzure => {
            let options = credentials::azure(environment).map_err(settings)?;
            let builder = configured!(MicrosoftAzureBuilder, url, options, skipped);
            let endpoint = builder.get_config_value(&AzureConfigKey::Endpoint);
            let allowed = builder.get_config_value(&AzureConfigKey::Client(http));
            insecure(endpoint, allowed, "AZURE_ALLOW_HTTP").map_or(Ok(()), Err)?;
            Box::new(builder.build().map_err(|e| settings(describe(&e)))?)
        }
        ObjectStoreScheme::GoogleCloudStorage => {
            let options = credentials::google(environment);
            let builder = configured!(GoogleCloudStorageBuilder, url, options, skipped);
            let endpoint = builder.get_config_value(&GoogleConfigKey::BaseUrl);
            let allowed = builder.get_config_value(&GoogleConfigKey::Client(http));
            insecure(endpoint, allowed, "GOOGLE_ALLOW_HTTP").map_or(Ok(()), Err)?;
            Box::new(builder.build().map_err(|e| settings(describe(&e)))?)
        }
        ObjectStoreScheme::Http => {
            // A URL with http:// states the intention already.
            let options = client().with_allow_http(true);
            let root = &url[..Position::BeforePath];
            let builder = HttpBuilder::new().with_url(root).with_client_options(options).with_retry(retries());
            let builder = builder.with_http_connector(OutwardRedirects);
            Box::new(builder.build().map_err(|e| settings(describe(&e)))?)
        }
        ObjectStoreScheme::Memory => Box::new(InMemory::new()),
        _ => return Err(StoreError::Location { location, reason: "there is no client for it".into() }),
    };
    let store = PrefixStore::new(store, prefix);
    // Directory buckets of S3 Express don't list in order.
    let in_order = environment.get("AWS_S3_EXPRESS").is_none();
    let store: Arc<dyn ObjectStore> = if in_order { Arc::new(SteadyListing(Arc::new(store))) } else { Arc::new(store) };
    Ok(Arc::new(Paced::new(store, Pace::REMOTE)))
}

/// No overall timeout: a transfer may take as long as it likes while enough data arrives ([`Pace`]).
fn client() -> ClientOptions {
    ClientOptions::new().with_timeout_disabled().with_connect_timeout(CONNECT_TIMEOUT).with_read_timeout(READ_TIMEOUT)
}

/// A few quick retries. [`super::retry`] and the ledger's database handle longer outages, and log them.
fn retries() -> RetryConfig {
    RetryConfig {
        backoff: BackoffConfig {
            init_backoff: Duration::from_millis(50),
            max_backoff: Duration::from_secs(1),
            base: 2.0,
        },
        max_retries: 3,
        retry_timeout: Duration::from_secs(30),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(url: &str, variables: &[(&str, &str)]) -> String {
        open_in(&Url::parse(url).unwrap(), &Environment::new(variables), &Arc::default()).unwrap_err().to_string()
    }

    fn opens(url: &str, variables: &[(&str, &str)]) {
        open_in(&Url::parse(url).unwrap(), &Environment::new(variables), &Arc::default()).unwrap();
    }

    #[test]
    fn an_unencrypted_endpoint_must_be_allowed_explicitly() {
        let keys = [("AWS_ACCESS_KEY_ID", "id"), ("AWS_SECRET_ACCESS_KEY", "hush")];
        let endpoint = ("AWS_ENDPOINT_URL", "http://me:hush@localhost:9000");
        let error = refused("s3://bucket/x", &[keys[0], keys[1], endpoint]);
        assert!(error.contains("http://localhost:9000") && error.contains("AWS_ALLOW_HTTP=true"), "{error}");
        opens("s3://bucket/x", &[keys[0], keys[1], endpoint, ("AWS_ALLOW_HTTP", "true")]);
        let base = ("GOOGLE_BASE_URL", "http://localhost:1");
        assert!(refused("gs://bucket/x", &[("GOOGLE_SKIP_SIGNATURE", "true"), base]).contains("GOOGLE_ALLOW_HTTP"));
    }

    #[test]
    fn credentials_in_a_store_url_are_refused_and_not_shown() {
        for url in ["s3://id:hush@bucket/x", "az://container/x?sig=hush"] {
            let error = refused(url, &[]);
            assert!(error.contains("environment") && !error.contains("hush"), "{error}");
        }
    }

    #[test]
    fn half_a_key_is_reported() {
        let error = refused("s3://bucket/x", &[("AWS_ACCESS_KEY_ID", "id")]);
        assert!(error.to_ascii_lowercase().contains("secret"), "{error}");
        let error = refused("az://container/x", &[]);
        assert!(error.to_ascii_lowercase().contains("account"), "{error}");
        assert!(refused("ftp://host/x", &[]).contains("ftp://host/x"));
    }

    #[test]
    fn variables_of_other_programs_are_not_settings() {
        // `token` and `endpoint` are names of settings in object_store.
        let keys = [("AWS_ACCESS_KEY_ID", "id"), ("AWS_SECRET_ACCESS_KEY", "hush")];
        opens("s3://bucket/x", &[keys[0], keys[1], ("ENDPOINT", "http://elsewhere"), ("TOKEN", "other")]);
    }
}
