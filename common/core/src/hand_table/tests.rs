use super::*;

fn text(file: &str, content: &[u8]) -> HandText {
    HandText::new("the file", file, content.to_vec()).unwrap()
}

/// The columns `key` and `label`, with line numbers.
fn rows(file: &str, content: &str) -> Result<Vec<(u64, String, String)>, String> {
    let text = text(file, content.as_bytes());
    let table = text.table(|header| header.has("key") && header.has("label")).map_err(|e| e.to_string())?;
    let table = table.ok_or("no table")?;
    let column = |name| table.required(name, "key,label").map_err(|e| e.to_string());
    let (key, label) = (column("key")?, column("label")?);
    let row = |row: HandRow| (row.line, row.cell(key).to_owned(), row.cell(label).to_owned());
    table.rows().map(|found| found.map(row).map_err(|e| e.to_string())).collect()
}

#[test]
fn a_table_reads_the_same_in_every_saved_form() {
    let expected = [(2, "a.png".to_owned(), "big cat".to_owned()), (3, "b.png".to_owned(), "dog".to_owned())];
    for content in [
        "key,label\na.png,big cat\nb.png,dog\n",
        "\u{feff}key,label\r\na.png,big cat\r\nb.png,dog\r\n",
        "key,label\ra.png,big cat\rb.png,dog",
        "Key , LABEL\n a.png , big cat \nb.png,dog\n",
        "key;label\na.png;big cat\nb.png;dog\n",
        "key\tlabel\na.png\tbig cat\nb.png\tdog\n",
        "\"key\";\"label\"\n\"a.png\";\"big cat\"\n\"b.png\";\"dog\"\n",
        "label, note, key\n\"big cat\", \"x, y\", a.png\ndog,,b.png\n",
        // R's write.csv, and a spreadsheet with empty columns and rows at the end.
        "\"\",\"key\",\"label\"\n\"1\",\"a.png\",\"big cat\"\n\"2\",\"b.png\",\"dog\"\n",
        "key,label,,\na.png,big cat,,\nb.png,dog,,,,\n,,,\n",
    ] {
        assert_eq!(rows("l.csv", content).unwrap(), expected, "{content:?}");
    }
}

#[test]
fn the_first_line_may_name_the_separator() {
    for content in ["sep=;\nkey;label\na;b,c\n", "\"SEP=;\"\r\nkey;label\r\na;b,c\r\n", "sep=|\nkey|label\na|b,c\n"] {
        assert_eq!(rows("l.csv", content).unwrap(), [(3, "a".to_owned(), "b,c".to_owned())], "{content:?}");
    }
    assert_eq!(rows("l.tsv", "key\tlabel\na,b\tc\n").unwrap(), [(2, "a,b".to_owned(), "c".to_owned())]);
}

#[test]
fn lines_are_counted_as_editors_count_them() {
    for end in ["\n", "\r\n", "\r"] {
        let content = ["", "key,label", "", "", "a,\"x", "y\"", "  ", "b,z", ""].join(end);
        let lines: Vec<_> = rows("l.csv", &content).unwrap().into_iter().map(|row| row.0).collect();
        assert_eq!(lines, [5, 8], "{end:?}");
    }
}

#[test]
fn invalid_tables_are_refused_by_file_and_line() {
    for (content, problem) in [
        ("key,label\na,b\nc,d,e\n", "the file l.csv, line 3: it has 3 fields, and the header names 2 columns"),
        ("key,label\na,b\n\"c,d\ne,f\n", "the file l.csv, line 3: the quote that opens here is never closed"),
        ("key,label,label\na,b\n", "the file l.csv: it has two columns 'label'"),
    ] {
        let error = rows("l.csv", content).unwrap_err();
        assert!(error.starts_with(problem), "{error}");
    }
    // Only one of these names matches exactly.
    assert_eq!(rows("l.csv", "key,LABEL,label,Label\na,x,b,y\n").unwrap()[0].2, "b");
    let text = text("l.csv", b"key,label\na,b\nc\n");
    let table = text.table(|header| header.has("key")).unwrap().unwrap();
    let error = table.whole_rows().last().unwrap().unwrap_err().to_string();
    assert!(error.contains("line 3: it has 1 field, and the header names 2 columns"), "{error}");
}

#[test]
fn other_encodings_are_refused_with_the_remedy() {
    let utf16 = |text: &str| text.encode_utf16().flat_map(u16::to_le_bytes).collect::<Vec<_>>();
    for (bytes, problem) in [
        ([&b"\xff\xfe"[..], &utf16("key\n")].concat(), "l.csv: it is UTF-16: save it as UTF-8"),
        (utf16("key\n"), "l.csv: it is UTF-16, or no text at all: save it as UTF-8"),
        (b"key\r\nb\r\ncaf\xe9\r\n".to_vec(), "l.csv, line 3: it is not UTF-8 but perhaps Latin-1: save it as UTF-8"),
    ] {
        let error = HandText::new("the file", "l.csv", bytes).unwrap_err().to_string();
        assert!(error.ends_with(problem), "{error}");
    }
}

#[test]
fn the_line_in_place_of_a_header_is_shown() {
    assert_eq!(text("l.csv", b"prompt;name;n, o\n1;2;3\n").shown_header(), "prompt, name, n, o");
    assert_eq!(text("l.csv", b"cat\ndog\n").shown_header(), "cat");
    assert_eq!(text("l.csv", b"\n").shown_header(), "nothing");
    assert!(text("l.csv", "x".repeat(1000).as_bytes()).shown_header().len() < 100);
}
