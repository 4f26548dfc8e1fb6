//! Keys that an AWS profile does not hold but says how to fetch: by single sign-on, from a role, or from another program.
//!
//! They expire after hours, and a job runs for days, so they are fetched again before they do.

use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock, PoisonError};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use aws_config::BehaviorVersion;
use aws_config::default_provider::credentials::DefaultCredentialsChain;
use aws_config::provider_config::ProviderConfig;
use aws_credential_types::Credentials;
use aws_credential_types::provider::ProvideCredentials;
use aws_credential_types::provider::error::CredentialsError;
use aws_smithy_http_client::tls::{Provider, rustls_provider::CryptoMode};
use elbo_core::causes::with_causes;
use object_store::aws::AwsCredential;
use object_store::{CredentialProvider, Error, Result};
use tokio::sync::Mutex;

/// How long before they expire keys are fetched again, as the AWS command line does.
const EARLY: Duration = Duration::from_secs(5 * 60);
/// How errors begin that no further attempt mends.
pub(super) const UNUSABLE: &str = "the AWS profile can't be used";

/// The keys of a profile, fetched when they are first needed.
#[derive(Debug)]
pub(super) struct ProfileKeys {
    profile: String,
    /// The latest keys, and when they expire.
    kept: Mutex<Option<Kept>>,
}

#[derive(Clone, Debug)]
struct Kept {
    keys: Arc<AwsCredential>,
    expiry: Option<SystemTime>,
}

impl Kept {
    /// Whether they are still valid after this time.
    #[expect(clippy::disallowed_methods, reason = "the expiry is a date")]
    fn lasts(&self, time: Duration) -> bool {
        self.expiry.is_none_or(|expiry| SystemTime::now() + time < expiry)
    }
}

impl From<Credentials> for Kept {
    fn from(fetched: Credentials) -> Self {
        let keys = AwsCredential {
            key_id: fetched.access_key_id().to_owned(),
            secret_key: fetched.secret_access_key().to_owned(),
            token: fetched.session_token().map(str::to_owned),
        };
        Self { keys: Arc::new(keys), expiry: fetched.expiry() }
    }
}

impl ProfileKeys {
    /// The keys of a profile in the AWS command line's files. All stores of this process share them.
    pub(super) fn of(profile: &str) -> Arc<Self> {
        static ALL: LazyLock<std::sync::Mutex<BTreeMap<String, Arc<ProfileKeys>>>> = LazyLock::new(Default::default);
        let mut all = ALL.lock().unwrap_or_else(PoisonError::into_inner);
        let new = || Self { profile: profile.to_owned(), kept: Mutex::default() };
        Arc::clone(all.entry(profile.to_owned()).or_insert_with(|| Arc::new(new())))
    }

    fn failed(&self, error: &CredentialsError) -> Error {
        let what = match error {
            CredentialsError::CredentialsNotLoaded(_) | CredentialsError::InvalidConfiguration(_) => UNUSABLE,
            _ => "fetching the keys of the AWS profile failed",
        };
        let source = format!(
            "{what}, '{profile}': {}; `aws sts get-caller-identity --profile {profile}` should succeed first (`aws sso login \
             --profile {profile}` signs in), or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_SKIP_SIGNATURE=true \
             for a public bucket",
            with_causes(error),
            profile = self.profile
        );
        Error::Generic { store: "S3", source: source.into() }
    }

    /// What follows the profile's settings, and after them this machine's own role. It is made anew for every fetch: after a
    /// failure it no longer says what failed.
    async fn chain(&self) -> DefaultCredentialsChain {
        let client =
            aws_smithy_http_client::Builder::new().tls_provider(Provider::Rustls(CryptoMode::Ring)).build_https();
        let config =
            ProviderConfig::default().with_http_client(client).with_behavior_version(Some(BehaviorVersion::latest()));
        DefaultCredentialsChain::builder().profile_name(&self.profile).configure(config).build().await
    }
}

#[async_trait]
impl CredentialProvider for ProfileKeys {
    type Credential = AwsCredential;

    async fn get_credential(&self) -> Result<Arc<AwsCredential>> {
        // Requests wait here for the one that fetches.
        let mut kept = self.kept.lock().await;
        if let Some(kept) = kept.as_ref().filter(|kept| kept.lasts(EARLY)) {
            return Ok(Arc::clone(&kept.keys));
        }
        match (self.chain().await.provide_credentials().await, kept.as_ref()) {
            (Ok(fetched), _) => Ok(Arc::clone(&kept.insert(fetched.into()).keys)),
            (Err(error), Some(still)) if still.lasts(Duration::ZERO) => {
                tracing::warn!(
                    profile = self.profile,
                    "fetching new keys failed; the old ones are still valid: {}",
                    with_causes(&error)
                );
                Ok(Arc::clone(&still.keys))
            }
            (Err(error), _) => Err(self.failed(&error)),
        }
    }
}
