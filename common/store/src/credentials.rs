//! Where credentials and endpoints come from: environment variables first, then the AWS command line's files.
//!
//! [`object_store`] knows the variables `AWS_*`, `AZURE_*` and `GOOGLE_*`. This module adds profiles in `~/.aws`, Azure's
//! connection string, and the variable names that Azure's command line uses.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use configparser::ini::{Ini, IniDefault};

use super::profile_keys::{ProfileKeys, WAYS};

/// Settings, by their lowercase names in [`object_store`].
pub(super) type Settings = Vec<(String, String)>;

/// The environment variables that configure storage.
#[derive(Clone, Default)]
pub(super) struct Environment(BTreeMap<String, String>);

impl Environment {
    /// The environment of this process.
    pub(super) fn of_process() -> Self {
        // Not `vars`, which panics if a variable is not Unicode.
        let pairs = std::env::vars_os().filter_map(|(k, v)| Some((k.into_string().ok()?, v.into_string().ok()?)));
        Self(pairs.filter(|(_, value)| !value.is_empty()).collect())
    }

    #[cfg(test)]
    pub(super) fn new(pairs: &[(&str, &str)]) -> Self {
        Self(pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect())
    }

    /// The value of a variable; `None` if it is unset or empty.
    pub(super) fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    fn has_any(&self, names: &[&str]) -> bool {
        names.iter().any(|name| self.0.contains_key(*name))
    }

    /// The variables that start with a prefix, in lowercase.
    fn starting_with(&self, prefix: &str) -> Settings {
        let ours = self.0.iter().filter(|(name, _)| name.starts_with(prefix));
        ours.map(|(name, value)| (name.to_ascii_lowercase(), value.clone())).collect()
    }

    fn home(&self) -> Option<PathBuf> {
        self.get("HOME").or_else(|| self.get("USERPROFILE")).map(PathBuf::from)
    }
}

/// The settings of Google Cloud Storage.
pub(super) fn google(environment: &Environment) -> Settings {
    let mut settings = environment.starting_with("GOOGLE_");
    settings.extend(environment.get("SERVICE_ACCOUNT").map(|path| ("google_service_account".into(), path.into())));
    settings
}

/// The settings of Azure Blob Storage; the error says what is wrong with the connection string.
pub(super) fn azure(environment: &Environment) -> Result<Settings, String> {
    // Of duplicate settings the last one wins, so the plainest names come last.
    let mut settings = match environment.get("AZURE_STORAGE_CONNECTION_STRING") {
        Some(text) => connection_string(text)?,
        None => Settings::new(),
    };
    let other_names = [
        ("AZURE_STORAGE_ACCOUNT", "azure_storage_account_name"),
        ("AZURE_STORAGE_KEY", "azure_storage_account_key"),
        ("IDENTITY_ENDPOINT", "azure_msi_endpoint"),
    ];
    for (variable, name) in other_names {
        settings.extend(environment.get(variable).map(|value| (name.to_owned(), value.to_owned())));
    }
    settings.extend(environment.starting_with("AZURE_"));
    Ok(settings)
}

/// Parses `AccountName=...;AccountKey=...`, as shown in the portal.
fn connection_string(text: &str) -> Result<Settings, String> {
    let mut parts = BTreeMap::new();
    for part in text.split(';').map(str::trim).filter(|part| !part.is_empty()) {
        // The text is secret, so the error must not contain any of it.
        let (name, value) = part.split_once('=').ok_or(
            "AZURE_STORAGE_CONNECTION_STRING is not a list of NAME=VALUE; copy it from the storage account's access keys",
        )?;
        parts.insert(name.trim().to_ascii_lowercase(), value.trim().to_owned());
    }
    if parts.get("usedevelopmentstorage").is_some_and(|value| value.eq_ignore_ascii_case("true")) {
        return Ok(vec![("azure_storage_use_emulator".into(), "true".into())]);
    }
    let account = parts.get("accountname").ok_or(
        "AZURE_STORAGE_CONNECTION_STRING names no AccountName; copy it from the storage account's access keys",
    )?;
    let mut settings = vec![("azure_storage_account_name".to_owned(), account.clone())];
    let suffix = parts.get("endpointsuffix").filter(|suffix| *suffix != "core.windows.net");
    let protocol = parts.get("defaultendpointsprotocol").map_or("https", String::as_str);
    let of_suffix = suffix.map(|suffix| format!("{protocol}://{account}.blob.{suffix}"));
    let endpoint = parts.get("blobendpoint").cloned().or(of_suffix);
    settings.extend(endpoint.map(|endpoint| ("azure_storage_endpoint".to_owned(), endpoint)));
    let of_part = |part: &str, name: &str| parts.get(part).map(|value| (name.to_owned(), value.clone()));
    settings.extend(of_part("accountkey", "azure_storage_account_key"));
    settings.extend(of_part("sharedaccesssignature", "azure_storage_sas_token"));
    Ok(settings)
}

/// Variables that supply credentials themselves. If one is set, those in the files are not used.
const AWS_CREDENTIALS: [&str; 6] = [
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_SKIP_SIGNATURE",
];

/// The settings of S3, and the profile whose keys have to be fetched, if there is one. The error says what is wrong with the
/// profile.
pub(super) fn s3(environment: &Environment) -> Result<(Settings, Option<Arc<ProfileKeys>>), String> {
    let mut settings = Settings::new();
    let profile = Profile::read(environment)?;
    let mut take = |key: &str, name: &str| settings.extend(profile.get(key).map(|value| (name.to_owned(), value)));
    if !environment.has_any(&["AWS_REGION", "AWS_DEFAULT_REGION"]) {
        take("region", "aws_region");
    }
    if !environment.has_any(&["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT"]) {
        take("endpoint_url", "aws_endpoint_url");
    }
    let mut fetched = None;
    if !environment.has_any(&AWS_CREDENTIALS) {
        if profile.has_plain_keys() {
            take("aws_access_key_id", "aws_access_key_id");
            take("aws_secret_access_key", "aws_secret_access_key");
            take("aws_session_token", "aws_session_token");
        } else if profile.is_followed()? {
            let region = ["AWS_REGION", "AWS_DEFAULT_REGION"].iter().find_map(|name| environment.get(name));
            let region = region.map(str::to_owned).or_else(|| profile.get("region"));
            fetched = Some(ProfileKeys::of(&profile.name, region.as_deref()));
        }
    }
    settings.extend(environment.starting_with("AWS_"));
    Ok((settings, fetched))
}

/// A profile of the AWS command line: its settings in `credentials` and `config`.
struct Profile {
    name: String,
    keys: BTreeMap<String, Option<String>>,
}

impl Profile {
    fn read(environment: &Environment) -> Result<Self, String> {
        let chosen = environment.get("AWS_PROFILE");
        let name = chosen.unwrap_or("default").to_owned();
        let mut found = false;
        let mut keys = BTreeMap::new();
        // `credentials` takes precedence over `config`.
        for (variable, usual, section) in [
            ("AWS_CONFIG_FILE", "config", if name == "default" { name.clone() } else { format!("profile {name}") }),
            ("AWS_SHARED_CREDENTIALS_FILE", "credentials", name.clone()),
        ] {
            let usual = environment.home().map(|home| home.join(".aws").join(usual));
            let Some(path) = environment.get(variable).map(PathBuf::from).or(usual) else { continue };
            let text = match std::fs::read_to_string(&path) {
                Ok(text) => text,
                Err(e) if e.kind() == std::io::ErrorKind::NotFound && environment.get(variable).is_none() => continue,
                Err(e) => return Err(format!("reading {}: {e}", path.display())),
            };
            let sections = parse(&text).map_err(|line| {
                format!("{} is not a file of AWS profiles: line {line} can't be parsed", path.display())
            })?;
            if let Some(section) = sections.get(&section) {
                found = true;
                keys.extend(section.clone());
            }
        }
        match chosen {
            Some(name) if !found && !environment.has_any(&AWS_CREDENTIALS) => Err(format!(
                "AWS_PROFILE is '{name}', but neither ~/.aws/credentials nor ~/.aws/config has such a profile: correct the name (`aws configure list-profiles` lists them)"
            )),
            _ => Ok(Self { name, keys }),
        }
    }

    fn get(&self, key: &str) -> Option<String> {
        self.keys.get(key).cloned().flatten().filter(|value| !value.is_empty())
    }

    /// Whether it says how its keys are fetched.
    fn is_followed(&self) -> Result<bool, String> {
        let Self { name, .. } = self;
        if self.get("login_session").is_some() {
            return Err(format!(
                "the AWS profile '{name}' gets its keys by login_session, which elbo does not follow: add a profile with `credential_process = aws configure export-credentials --profile {name} --format process` to ~/.aws/config, and name it in AWS_PROFILE"
            ));
        }
        Ok(WAYS.iter().any(|way| self.get(way).is_some()))
    }

    /// Whether its keys stand in the files. Those beside a role are the role's source.
    fn has_plain_keys(&self) -> bool {
        self.get("aws_access_key_id").is_some() && self.get("role_arn").is_none()
    }
}

/// Parses an INI file as AWS writes it. The error is the number of the invalid line, since its text may be secret.
fn parse(text: &str) -> Result<BTreeMap<String, BTreeMap<String, Option<String>>>, usize> {
    let mut style = IniDefault::default();
    style.case_sensitive = true;
    style.delimiters = vec!['='];
    style.comment_symbols = vec!['#', ';'];
    style.inline_comment_symbols = Some(vec![]);
    let mut ini = Ini::new_from_defaults(style);
    // Indented lines are nested settings (`s3 =`), none of which are used here.
    let flat: Vec<&str> =
        text.trim_start_matches('\u{feff}').lines().map(|l| if l.starts_with([' ', '\t']) { "" } else { l }).collect();
    let sections = ini.read(flat.join("\n")).map_err(|_| broken_line(&flat))?;
    let normal = |section: &str| section.split_whitespace().collect::<Vec<_>>().join(" ");
    Ok(sections.into_iter().map(|(name, keys)| (normal(&name), keys.into_iter().collect())).collect())
}

/// The line that opens a section without closing it: the only possible error.
fn broken_line(lines: &[&str]) -> usize {
    let broken = |line: &&str| line.starts_with('[') && !line.contains(']');
    lines.iter().position(broken).map_or(1, |at| at + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of<'a>(settings: &'a Settings, name: &str) -> Option<&'a str> {
        settings.iter().rev().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    /// An environment whose home directory has these AWS files.
    fn home(credentials: &str, config: &str, variables: &[(&str, &str)]) -> (tempfile::TempDir, Environment) {
        let home = tempfile::TempDir::new().unwrap();
        let aws = home.path().join(".aws");
        std::fs::create_dir(&aws).unwrap();
        std::fs::write(aws.join("credentials"), credentials).unwrap();
        std::fs::write(aws.join("config"), config).unwrap();
        let mut environment = Environment::new(variables);
        environment.0.insert("HOME".into(), home.path().to_string_lossy().into_owned());
        (home, environment)
    }

    const CREDENTIALS: &str = "# keys\n[default]\naws_access_key_id = AKIA1\naws_secret_access_key=a/b+c#d;e==\n\n[lab]\naws_access_key_id=AKIA2\naws_secret_access_key=two\naws_session_token=token\n";
    const CONFIG: &str = "[default]\nregion = eu-west-1\ns3 =\n  max_concurrent_requests = 20\n  region = nested\n[profile lab]\nregion=us-west-2\nendpoint_url = http://localhost:9000\n[profile sso]\nsso_session = corp\nregion = x\n[profile region]\nregion = y\n[profile login]\nlogin_session = arn:aws:iam::1:user/me\n[profile role]\nrole_arn = arn:aws:iam::1:role/r\naws_access_key_id = AKIA3\nsource_profile = role\n";

    #[test]
    fn the_default_profile_is_read_as_it_is_written() {
        let (_home, environment) = home(CREDENTIALS, CONFIG, &[]);
        let (settings, fetched) = s3(&environment).unwrap();
        assert_eq!(of(&settings, "aws_access_key_id"), Some("AKIA1"));
        assert_eq!(of(&settings, "aws_secret_access_key"), Some("a/b+c#d;e=="));
        assert_eq!(of(&settings, "aws_region"), Some("eu-west-1"));
        assert_eq!(of(&settings, "aws_endpoint_url"), None);
        assert!(fetched.is_none());
    }

    #[test]
    fn a_named_profile_sets_token_region_and_endpoint() {
        let (_home, environment) = home(CREDENTIALS, CONFIG, &[("AWS_PROFILE", "lab")]);
        let (settings, fetched) = s3(&environment).unwrap();
        assert_eq!(of(&settings, "aws_access_key_id"), Some("AKIA2"));
        assert_eq!(of(&settings, "aws_session_token"), Some("token"));
        assert_eq!(of(&settings, "aws_region"), Some("us-west-2"));
        assert_eq!(of(&settings, "aws_endpoint_url"), Some("http://localhost:9000"));
        assert!(fetched.is_none());
    }

    #[test]
    fn keys_that_a_profile_does_not_hold_are_fetched() {
        let fetches = |variables: &[(&str, &str)]| s3(&home(CREDENTIALS, CONFIG, variables).1).unwrap().1.is_some();
        assert!(fetches(&[("AWS_PROFILE", "sso")]));
        // The keys beside a role are those that may take it.
        assert!(fetches(&[("AWS_PROFILE", "role")]));
        assert!(!fetches(&[("AWS_PROFILE", "sso"), ("AWS_ACCESS_KEY_ID", "AKIA9")]));
        assert!(!fetches(&[("AWS_PROFILE", "sso"), ("AWS_SKIP_SIGNATURE", "true")]));
        // Without any, this machine's role is used.
        assert!(!fetches(&[("AWS_PROFILE", "region")]));
    }

    #[test]
    fn the_environment_wins_and_keys_are_never_mixed() {
        let variables = [("AWS_PROFILE", "lab"), ("AWS_ACCESS_KEY_ID", "AKIA9"), ("AWS_SECRET_ACCESS_KEY", "nine")];
        let (_home, environment) = home(CREDENTIALS, CONFIG, &variables);
        let (settings, _) = s3(&environment).unwrap();
        assert_eq!(of(&settings, "aws_access_key_id"), Some("AKIA9"));
        assert_eq!(of(&settings, "aws_session_token"), None, "a token of another key makes every request fail");
        assert_eq!(of(&settings, "aws_region"), Some("us-west-2"));
        let (_home, environment) = home(CREDENTIALS, CONFIG, &[("AWS_REGION", "here"), ("AWS_SKIP_SIGNATURE", "true")]);
        let (settings, _) = s3(&environment).unwrap();
        assert_eq!((of(&settings, "aws_region"), of(&settings, "aws_access_key_id")), (Some("here"), None));
    }

    #[test]
    fn profiles_that_cannot_be_used_say_what_to_do() {
        let refused = |variables: &[(&str, &str)]| s3(&home(CREDENTIALS, CONFIG, variables).1).unwrap_err();
        assert!(refused(&[("AWS_PROFILE", "nobody")]).contains("'nobody'"));
        let login = refused(&[("AWS_PROFILE", "login")]);
        assert!(login.contains("export-credentials --profile login --format process"), "{login}");
        assert!(refused(&[("AWS_CONFIG_FILE", "/no/such/file")]).contains("/no/such/file"));
        let (_home, broken) = home("[default]\naws_secret_access_key = hush\n[lab\n", "", &[]);
        let error = s3(&broken).unwrap_err();
        assert!(error.contains("line 3") && !error.contains("hush"), "{error}");
        let (settings, fetched) = s3(&Environment::default()).unwrap();
        assert!(settings.is_empty() && fetched.is_none());
    }

    #[test]
    fn a_connection_string_is_parsed_and_plain_variables_win() {
        let text = "DefaultEndpointsProtocol=https;AccountName=acc;AccountKey=a+b/c==;EndpointSuffix=core.windows.net";
        let variables = [("AZURE_STORAGE_CONNECTION_STRING", text)];
        let settings = azure(&Environment::new(&variables)).unwrap();
        assert_eq!(of(&settings, "azure_storage_account_name"), Some("acc"));
        assert_eq!(of(&settings, "azure_storage_account_key"), Some("a+b/c=="));
        assert_eq!(of(&settings, "azure_storage_endpoint"), None);
        let china = text.replace("core.windows.net", "core.chinacloudapi.cn");
        let variables = [("AZURE_STORAGE_CONNECTION_STRING", &*china), ("AZURE_STORAGE_KEY", "other")];
        let settings = azure(&Environment::new(&variables)).unwrap();
        assert_eq!(of(&settings, "azure_storage_endpoint"), Some("https://acc.blob.core.chinacloudapi.cn"));
        assert_eq!(of(&settings, "azure_storage_account_key"), Some("other"));
        let broken = azure(&Environment::new(&[("AZURE_STORAGE_CONNECTION_STRING", "hush")])).unwrap_err();
        assert!(!broken.contains("hush") && broken.contains("NAME=VALUE"), "{broken}");
    }
}
