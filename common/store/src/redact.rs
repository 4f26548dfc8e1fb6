//! Removes credentials from text of other programs.

/// Reduces every URL in a text to scheme, host and path. User, password, query and fragment may be credentials (a presigned
/// URL's signature, a shared access signature), so they are removed.
pub fn redact(text: &str) -> String {
    let mut clean = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("://") {
        let (before, after) = rest.split_at(at + 3);
        clean.push_str(before);
        let end = after.find(|c: char| c.is_whitespace() || matches!(c, '"' | '<' | '>')).unwrap_or(after.len());
        let (url, following) = after.split_at(end);
        push_bare(&mut clean, url);
        rest = following;
    }
    clean.push_str(rest);
    clean
}

/// Appends the parts of a URL after its scheme that may be shown, and the punctuation of the sentence around it.
fn push_bare(clean: &mut String, url: &str) {
    let authority = url.find(['/', '?', '#']).unwrap_or(url.len());
    let host = url[..authority].rfind('@').map_or(0, |at| at + 1);
    let shown = url.find(['?', '#']).unwrap_or(url.len());
    clean.push_str(&url[host..shown]);
    if shown < url.len() {
        let hidden = &url[shown..];
        let sentence = hidden.trim_end_matches(['\'', ')', ']', '`', ',', ';', ':', '.']).len();
        clean.push_str("?…");
        clean.push_str(&hidden[sentence..]);
    }
}

#[cfg(test)]
mod tests {
    use super::redact;

    #[test]
    fn users_passwords_and_queries_are_removed_and_the_rest_stays() {
        for (text, clean) in [
            ("plain text: no URL", "plain text: no URL"),
            ("PUT https://u:p@host:1/a/b@c.png?sig=x#y in 3 s", "PUT https://host:1/a/b@c.png?… in 3 s"),
            ("'https://host/a?sig=x', or (s3://bucket/k)", "'https://host/a?…', or (s3://bucket/k)"),
            ("for url (http://u:p@host/?X-Amz-Signature=x): refused", "for url (http://host/?…): refused"),
            ("\"az://c?sig=a%2Fb\"; gs://b/#x", "\"az://c?…\"; gs://b/?…"),
            ("s3://", "s3://"),
            ("ends in ://u:p@", "ends in ://"),
        ] {
            assert_eq!(redact(text), clean);
        }
    }
}
