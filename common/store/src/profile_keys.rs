//! Keys that an AWS profile does not hold but says how to fetch: by single sign-on, from a role, or from another program.
//!
//! They expire after hours, and a job runs for days, so they are fetched again before they do.

use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use async_trait::async_trait;
use aws_config::profile::ProfileFileCredentialsProvider;
use aws_config::provider_config::ProviderConfig;
use aws_config::{BehaviorVersion, Region};
use aws_credential_types::Credentials;
use aws_credential_types::provider::error::CredentialsError;
use aws_credential_types::provider::{ProvideCredentials, future};
use aws_smithy_http_client::tls::{Provider, rustls_provider::CryptoMode};
use elbo_core::causes::with_causes;
use object_store::aws::AwsCredential;
use object_store::{CredentialProvider, Error, Result};
use tokio::sync::Mutex;
use tokio::time::timeout;

/// The settings of a profile that say how its keys are fetched.
pub(super) const WAYS: [&str; 6] = [
    "role_arn",
    "sso_session",
    "sso_start_url",
    "credential_process",
    // Refused where it names a missing or unknown source, rather than passed over for this machine's own role.
    "credential_source",
    "source_profile",
];
/// How long before they expire keys are fetched again, as the AWS command line does.
const EARLY: Duration = Duration::from_secs(5 * 60);
/// How long keys without an expiry are kept.
const DAY: Duration = Duration::from_secs(24 * 60 * 60);
/// The longest wait for keys. Another program may hang, and all requests wait for it.
const LIMIT: Duration = Duration::from_secs(60);
/// The pause after a failure while the old keys are still valid.
const PAUSE: Duration = Duration::from_secs(30);
/// How long a failure is passed on to the requests that waited for the keys, instead of fetching them once for each.
const SHARED: Duration = Duration::from_secs(1);

/// A profile that gives no keys.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum KeysError {
    /// What the profile says can't be followed.
    #[error(
        "the AWS profile '{profile}' can't be used: {reason}; correct it in ~/.aws/config until `aws sts get-caller-identity \
         --profile {profile}` succeeds"
    )]
    Unusable {
        /// The profile.
        profile: String,
        /// What is wrong.
        reason: String,
    },
    /// Its keys were not given now.
    #[error(
        "the keys of the AWS profile '{profile}' can't be fetched: {reason}; see if `aws sts get-caller-identity --profile \
         {profile}` succeeds (`aws sso login --profile {profile}` signs in), then run the same command again, which resumes a job"
    )]
    Failed {
        /// The profile.
        profile: String,
        /// What happened.
        reason: String,
    },
}

impl KeysError {
    fn new(profile: &str, error: &CredentialsError) -> Self {
        let (profile, reason) = (profile.to_owned(), with_causes(error));
        match error {
            CredentialsError::CredentialsNotLoaded(_) | CredentialsError::InvalidConfiguration(_) => {
                Self::Unusable { profile, reason }
            }
            _ => Self::Failed { profile, reason },
        }
    }

    /// Whether fetching may succeed later.
    pub(super) fn is_transient(&self) -> bool {
        matches!(self, Self::Failed { .. })
    }
}

impl From<KeysError> for Error {
    fn from(error: KeysError) -> Self {
        Self::Generic { store: "S3", source: error.into() }
    }
}

/// Follows a profile. It starts anew each time: after a failure, a provider no longer says what failed.
#[derive(Debug)]
struct ByProfile {
    name: String,
    region: Region,
}

impl ProvideCredentials for ByProfile {
    fn provide_credentials<'a>(&'a self) -> future::ProvideCredentials<'a>
    where
        Self: 'a,
    {
        let client =
            aws_smithy_http_client::Builder::new().tls_provider(Provider::Rustls(CryptoMode::Ring)).build_https();
        let config = ProviderConfig::default()
            .with_http_client(client)
            .with_behavior_version(Some(BehaviorVersion::latest()))
            .with_region(Some(self.region.clone()));
        let provider = ProfileFileCredentialsProvider::builder().configure(&config).profile_name(&self.name).build();
        future::ProvideCredentials::new(async move { provider.provide_credentials().await })
    }
}

/// The keys of a profile, fetched when they are first needed.
#[derive(Debug)]
pub(super) struct ProfileKeys {
    profile: String,
    provider: Box<dyn ProvideCredentials>,
    limit: Duration,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    kept: Option<Kept>,
    failed: Option<(Instant, KeysError)>,
}

#[derive(Debug)]
struct Kept {
    keys: Arc<AwsCredential>,
    expiry: Option<SystemTime>,
    /// When to fetch them again.
    due: Instant,
}

impl Kept {
    fn new(fetched: &Credentials) -> Self {
        let keys = AwsCredential {
            key_id: fetched.access_key_id().to_owned(),
            secret_key: fetched.secret_access_key().to_owned(),
            token: fetched.session_token().map(str::to_owned),
        };
        let lasts = fetched.expiry().map_or(DAY, time_until);
        Self { keys: Arc::new(keys), expiry: fetched.expiry(), due: Instant::now() + kept_for(lasts) }
    }

    fn are_valid(&self) -> bool {
        self.expiry.is_none_or(|expiry| !time_until(expiry).is_zero())
    }
}

/// The time until a date; zero if it has passed.
#[expect(clippy::disallowed_methods, reason = "an expiry is a date")]
fn time_until(date: SystemTime) -> Duration {
    date.duration_since(SystemTime::now()).unwrap_or_default()
}

/// How long keys are used that last this long: keys of a few minutes are renewed at half of that.
fn kept_for(lasts: Duration) -> Duration {
    lasts.min(DAY).saturating_sub(EARLY.min(lasts / 2))
}

impl ProfileKeys {
    /// The keys of a profile in the AWS command line's files. All stores of this process share them.
    pub(super) fn of(profile: &str, region: Option<&str>) -> Arc<Self> {
        static ALL: LazyLock<std::sync::Mutex<BTreeMap<String, Arc<ProfileKeys>>>> = LazyLock::new(Default::default);
        let region = Region::new(region.unwrap_or("us-east-1").to_owned());
        let mut all = ALL.lock().unwrap_or_else(PoisonError::into_inner);
        let new = || Arc::new(Self::new(profile, ByProfile { name: profile.to_owned(), region }));
        Arc::clone(all.entry(profile.to_owned()).or_insert_with(new))
    }

    fn new(profile: &str, provider: impl ProvideCredentials + 'static) -> Self {
        Self { profile: profile.to_owned(), provider: Box::new(provider), limit: LIMIT, state: Mutex::default() }
    }

    async fn fetch(&self) -> std::result::Result<Credentials, KeysError> {
        let fetched = timeout(self.limit, self.provider.provide_credentials()).await;
        let fetched = fetched.map_err(|_| CredentialsError::provider_timed_out(self.limit)).flatten();
        fetched.map_err(|error| KeysError::new(&self.profile, &error))
    }
}

#[async_trait]
impl CredentialProvider for ProfileKeys {
    type Credential = AwsCredential;

    async fn get_credential(&self) -> Result<Arc<AwsCredential>> {
        // Requests wait here for the one that fetches.
        let mut state = self.state.lock().await;
        let State { kept, failed } = &mut *state;
        let valid = kept.as_mut().filter(|kept| kept.are_valid());
        if let Some(kept) = &valid
            && Instant::now() < kept.due
        {
            return Ok(Arc::clone(&kept.keys));
        }
        if let (None, Some((at, error))) = (&valid, &*failed)
            && at.elapsed() < SHARED
        {
            return Err(error.clone().into());
        }
        match (self.fetch().await, valid) {
            (Ok(fetched), _) => Ok(Arc::clone(&kept.insert(Kept::new(&fetched)).keys)),
            (Err(error), Some(kept)) if kept.are_valid() => {
                tracing::warn!("{error}; the keys from before are still valid");
                kept.due = Instant::now() + PAUSE;
                Ok(Arc::clone(&kept.keys))
            }
            (Err(error), _) => {
                *failed = Some((Instant::now(), error.clone()));
                Err(error.into())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::transient::is_transient;

    #[derive(Clone, Debug)]
    enum Answer {
        /// Keys that last this long.
        Keys(Duration),
        Refused,
        Unusable,
        Silence,
    }

    /// Gives one answer after the other, and then the last again and again.
    #[derive(Clone, Debug)]
    struct Fake {
        answers: Vec<Answer>,
        asked: Arc<AtomicUsize>,
    }

    impl ProvideCredentials for Fake {
        fn provide_credentials<'a>(&'a self) -> future::ProvideCredentials<'a>
        where
            Self: 'a,
        {
            future::ProvideCredentials::new(async {
                let at = self.asked.fetch_add(1, Ordering::Relaxed);
                tokio::task::yield_now().await;
                match &self.answers[at.min(self.answers.len() - 1)] {
                    Answer::Keys(lasts) => {
                        #[expect(clippy::disallowed_methods, reason = "an expiry is a date")]
                        let expiry = SystemTime::now() + *lasts;
                        Ok(Credentials::new(format!("key {at}"), "secret", None, Some(expiry), "fake"))
                    }
                    Answer::Refused => Err(CredentialsError::provider_error("the vault is sealed")),
                    Answer::Unusable => Err(CredentialsError::not_loaded("no such source")),
                    Answer::Silence => std::future::pending().await,
                }
            })
        }
    }

    fn keys(answers: &[Answer]) -> (ProfileKeys, Arc<AtomicUsize>) {
        let asked = Arc::new(AtomicUsize::new(0));
        let keys = ProfileKeys::new("lab", Fake { answers: answers.to_vec(), asked: Arc::clone(&asked) });
        (ProfileKeys { limit: Duration::from_millis(100), ..keys }, asked)
    }

    async fn key(keys: &ProfileKeys) -> std::result::Result<String, Error> {
        keys.get_credential().await.map(|keys| keys.key_id.clone())
    }

    const HOUR: Duration = Duration::from_secs(3600);
    const MOMENT: Duration = Duration::from_secs(4);

    #[test]
    fn keys_are_renewed_five_minutes_early_or_halfway() {
        assert_eq!(kept_for(HOUR), HOUR - EARLY);
        assert_eq!(kept_for(Duration::from_secs(60)), Duration::from_secs(30));
        assert_eq!(kept_for(Duration::ZERO), Duration::ZERO);
        assert_eq!(kept_for(Duration::MAX), DAY - EARLY);
    }

    #[tokio::test]
    async fn requests_share_one_fetch_and_its_failure() {
        let (working, asked) = keys(&[Answer::Keys(HOUR)]);
        let all = futures::future::join_all((0..8).map(|_| key(&working))).await;
        assert!(all.into_iter().all(|key| key.unwrap() == "key 0"));
        assert_eq!((key(&working).await.unwrap().as_str(), asked.load(Ordering::Relaxed)), ("key 0", 1));

        let (hanging, asked) = keys(&[Answer::Silence]);
        let all = futures::future::join_all((0..8).map(|_| key(&hanging))).await;
        assert!(all.into_iter().all(|key| key.unwrap_err().to_string().contains("timed out")));
        assert_eq!(asked.load(Ordering::Relaxed), 1);
    }

    #[tokio::test]
    async fn old_keys_serve_until_they_expire_if_new_ones_are_refused() {
        let (renewed, asked) = keys(&[Answer::Keys(MOMENT), Answer::Refused, Answer::Keys(HOUR)]);
        assert_eq!(key(&renewed).await.unwrap(), "key 0");
        tokio::time::sleep(MOMENT / 2 + Duration::from_millis(50)).await;
        // Due, refused, and not asked for again at once.
        assert_eq!(key(&renewed).await.unwrap(), "key 0");
        assert_eq!(key(&renewed).await.unwrap(), "key 0");
        assert_eq!(asked.load(Ordering::Relaxed), 2);
        tokio::time::sleep(MOMENT / 2).await;
        assert_eq!(key(&renewed).await.unwrap(), "key 2");
    }

    #[tokio::test]
    async fn a_profile_that_is_wrong_stays_wrong_and_a_failure_may_pass() {
        let wrong = key(&keys(&[Answer::Unusable]).0).await.unwrap_err();
        assert!(wrong.to_string().contains("'lab' can't be used") && !is_transient(&wrong), "{wrong}");
        let refused = key(&keys(&[Answer::Refused]).0).await.unwrap_err();
        assert!(refused.to_string().contains("the vault is sealed") && is_transient(&refused), "{refused}");
    }
}
