use std::sync::Arc;

use arrow_array::builder::{ListBuilder, StringBuilder};
use arrow_array::{BinaryArray, BooleanArray, Float32Array, Float64Array, Int64Array, LargeBinaryArray, StringArray};
use elbo_core::class::Classes;
use elbo_core::sample::Sample;
use parquet::arrow::ArrowWriter;
use parquet::file::metadata::KeyValue;
use parquet::file::properties::{EnabledStatistics, WriterProperties};
use tempfile::TempDir;

use super::super::{LabelSource, list as list_source};
use super::*;
use crate::budget::Budget;

/// A directory with a Parquet file of these columns.
struct Dataset(TempDir);

impl Dataset {
    fn new(columns: Vec<(&str, ArrayRef)>) -> Self {
        Self::with(columns, WriterProperties::builder().set_max_row_group_row_count(Some(3)).build())
    }

    fn with(columns: Vec<(&str, ArrayRef)>, properties: WriterProperties) -> Self {
        let root = TempDir::new().unwrap();
        let batch = RecordBatch::try_from_iter_with_nullable(columns.into_iter().map(|(n, c)| (n, c, true))).unwrap();
        let file = std::fs::File::create(root.path().join("train.parquet")).unwrap();
        let mut writer = ArrowWriter::try_new(file, batch.schema(), Some(properties)).unwrap();
        writer.write(&batch).unwrap();
        writer.close().unwrap();
        Self(root)
    }

    async fn list(&self, options: &ListOptions<'_>) -> Result<Vec<Sample>, DatasetError> {
        let mut samples = Vec::new();
        list_source(self.0.path().to_str().unwrap(), options, &mut samples).await?;
        Ok(samples)
    }

    async fn error(&self, options: &ListOptions<'_>) -> String {
        self.list(options).await.unwrap_err().to_string()
    }
}

fn image(row: u64) -> Vec<u8> {
    format!("image {row}").into_bytes()
}

fn bytes(rows: u64) -> ArrayRef {
    Arc::new(BinaryArray::from_iter_values((0..rows).map(image)))
}

fn strings(values: &[Option<&str>]) -> ArrayRef {
    Arc::new(StringArray::from(values.to_vec()))
}

/// Images as the Hugging Face datasets library writes them.
fn structs(bytes: Vec<Option<Vec<u8>>>, paths: &[Option<&str>]) -> ArrayRef {
    let bytes: ArrayRef = Arc::new(BinaryArray::from_iter(bytes));
    let fields = vec![
        (Arc::new(Field::new("bytes", DataType::Binary, true)), bytes),
        (Arc::new(Field::new("path", DataType::Utf8, true)), strings(paths)),
    ];
    Arc::new(StructArray::from(fields))
}

#[tokio::test]
async fn every_row_is_read_back_from_the_cell_it_was_listed_at() {
    let dataset = Dataset::new(vec![("img", bytes(10)), ("label", Arc::new(Int64Array::from_iter_values(0..10)))]);
    let samples = dataset.list(&ListOptions::default()).await.unwrap();
    let reader = Reader::new();
    assert_eq!(samples.len(), 10);
    // In another order, like workers.
    for row in [7, 0, 9, 3, 2, 8, 1, 4, 6, 5] {
        let sample = &samples[row as usize];
        assert_eq!(sample.key, format!("train.parquet/{row:06}"));
        assert_eq!(sample.label, Some(row.to_string()));
        assert_eq!(reader.read(&sample.into()).await.unwrap(), image(row));
    }
    // The same with a path that goes up.
    std::fs::create_dir(dataset.0.path().join("deep")).unwrap();
    for source in ["deep/..", "deep/../train.parquet", "deep/../*.parquet"] {
        let mut again = Vec::new();
        let source = dataset.0.path().join(source);
        list_source(source.to_str().unwrap(), &ListOptions::default(), &mut again).await.unwrap();
        assert_eq!(again, samples, "{}", source.display());
    }
    let mut beyond = samples[0].clone();
    beyond.part = Some(Part::Cell { row: 10, column: "img".into() });
    assert!(reader.read(&(&beyond).into()).await.unwrap_err().to_string().contains("the file has 10 rows"));
}

#[tokio::test]
async fn hugging_face_images_are_bytes_or_files_next_to_the_table() {
    let names = r#"{"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}"#;
    let properties = WriterProperties::builder()
        .set_max_row_group_row_count(Some(2))
        .set_key_value_metadata(Some(vec![KeyValue::new("huggingface".into(), names.to_owned())]))
        .build();
    let images = structs(
        vec![Some(image(0)), Some(image(1)), None, None],
        &[Some("a.png"), None, Some("c.png"), Some("sub/d.png")],
    );
    let labels: ArrayRef = Arc::new(Int64Array::from(vec![Some(1), Some(0), Some(1), None]));
    let dataset = Dataset::with(vec![("image", images), ("label", labels)], properties);
    std::fs::create_dir(dataset.0.path().join("sub")).unwrap();
    for (name, row) in [("c.png", 2), ("sub/d.png", 3)] {
        std::fs::write(dataset.0.path().join(name), image(row)).unwrap();
    }
    let parquet = dataset.0.path().join("*.parquet");
    let list = async |options: &ListOptions<'_>| {
        let mut samples = Vec::new();
        list_source(parquet.to_str().unwrap(), options, &mut samples).await.unwrap();
        samples
    };
    let samples = list(&ListOptions::default()).await;
    let keys: Vec<_> = samples.iter().map(|s| s.key.as_str()).collect();
    assert_eq!(keys, ["train.parquet/000000", "train.parquet/000001", "c.png", "sub/d.png"]);
    let labels: Vec<_> = samples.iter().map(|s| s.label.as_deref()).collect();
    assert_eq!(labels, [Some("dog"), Some("cat"), Some("dog"), None]);
    for (row, sample) in (0..).zip(&samples) {
        assert_eq!(Reader::new().read(&sample.into()).await.unwrap(), image(row));
    }
    // A job with other class names uses the numbers.
    let classes = Classes::parse("prompt,classname,classidx\na,feline,0\nb,canine,1\n", &[]).unwrap();
    let samples = list(&ListOptions { classes: Some(&classes), ..ListOptions::default() }).await;
    assert_eq!(samples[0].label.as_deref(), Some("1"));
}

#[tokio::test]
async fn paths_are_relative_to_the_file_and_must_be_there() {
    let dataset = Dataset::new(vec![("file_name", strings(&[Some("b.bin"), Some("a.bin")]))]);
    std::fs::write(dataset.0.path().join("a.bin"), image(1)).unwrap();
    let missing = dataset.error(&ListOptions::default()).await;
    assert!(missing.contains("row 0") && missing.contains("there is no"), "{missing}");
    std::fs::write(dataset.0.path().join("b.bin"), image(0)).unwrap();
    let samples = dataset.list(&ListOptions::default()).await.unwrap();
    assert_eq!(samples.iter().map(|s| (s.key.as_str(), s.size)).collect::<Vec<_>>(), [("b.bin", 7), ("a.bin", 7)]);
}

#[tokio::test]
async fn captions_are_a_list_or_several_columns() {
    let mut lists = ListBuilder::new(StringBuilder::new());
    for captions in [&["a cat", "a dog"][..], &["an owl"]] {
        captions.iter().for_each(|caption| lists.values().append_value(caption));
        lists.append(true);
    }
    let columns = || {
        vec![
            ("jpg", bytes(2)),
            ("c0", strings(&[Some("x"), Some("y")])),
            ("c1", strings(&[Some("z"), None])),
            ("key", strings(&[Some("first"), Some("second")])),
            ("label", Arc::new(Int64Array::from(vec![1, 0])) as ArrayRef),
        ]
    };
    let mut with_list = columns();
    with_list.push(("captions", Arc::new(lists.finish())));
    let dataset = Dataset::new(with_list);
    let options = |candidates| ListOptions { candidates: Some(candidates), ..ListOptions::default() };
    let samples = dataset.list(&options("captions")).await.unwrap();
    assert_eq!((samples[0].key.as_str(), samples[0].label.as_deref()), ("first", Some("a dog")));
    assert_eq!(samples[1].candidates, ["an owl"]);
    let samples = dataset.list(&options("c0, c1")).await.unwrap();
    assert_eq!(samples.iter().map(|s| s.candidates.len()).collect::<Vec<_>>(), [2, 1]);
    assert!(
        dataset.error(&options("c1")).await.contains("row 0 that can't be used: its label '1' is none of its captions")
    );
    assert!(dataset.error(&options("c2")).await.contains("no column 'c2'"));
}

#[tokio::test]
async fn labels_come_from_the_named_column() {
    let dataset = Dataset::new(vec![
        ("image", bytes(2)),
        ("label", strings(&[Some("a"), Some("b")])),
        ("fine", strings(&[Some("c"), None])),
    ]);
    let labels = async |from: &str| {
        let from = LabelSource::from(from);
        let samples = dataset.list(&ListOptions { label_from: Some(&from), ..ListOptions::default() }).await;
        samples.map(|samples| samples.into_iter().map(|s| s.label.unwrap_or_default()).collect::<Vec<_>>())
    };
    assert_eq!(labels("column:fine").await.unwrap(), ["c", ""]);
    assert_eq!(labels("none").await.unwrap(), ["", ""]);
    assert!(labels("column:coarse").await.unwrap_err().to_string().contains("label (string)"));
}

#[tokio::test]
async fn errors_about_missing_or_ambiguous_image_columns_list_the_columns() {
    let numbers = || Arc::new(Int64Array::from(vec![1, 2])) as ArrayRef;
    let error = Dataset::new(vec![("size", numbers())]).error(&ListOptions::default()).await;
    assert!(error.contains("no column of images") && error.contains("size (int64)"), "{error}");
    let two = Dataset::new(vec![("left", bytes(2)), ("right", bytes(2)), ("size", numbers())]);
    let error = two.error(&ListOptions::default()).await;
    assert!(error.contains("--image-column"), "{error}");
    let asked = |column| ListOptions { image_column: Some(column), ..ListOptions::default() };
    let samples = two.list(&asked("right")).await.unwrap();
    assert_eq!(samples[1].part, Some(Part::Cell { row: 1, column: "right".into() }));
    assert!(two.error(&asked("size")).await.contains("can't hold images"));
    assert!(two.error(&asked("middle")).await.contains("no column 'middle'"));

    let keys = Dataset::new(vec![("jpg", bytes(2)), ("key", strings(&[Some("k"), Some("k")]))]);
    assert!(keys.error(&ListOptions::default()).await.contains("two images named k"));
    std::fs::write(two.0.path().join("train.parquet"), b"PAR1 and nothing more").unwrap();
    assert!(two.error(&ListOptions::default()).await.contains("not a Parquet file, or is damaged"));
}

#[tokio::test]
async fn a_row_without_an_image_is_listed_and_fails_when_it_is_read() {
    let column: ArrayRef = Arc::new(LargeBinaryArray::from(vec![Some(&b"image 0"[..]), None]));
    let dataset = Dataset::new(vec![("image", column)]);
    let samples = dataset.list(&ListOptions::default()).await.unwrap();
    let reader = Reader::new().with_limit(7);
    assert_eq!(reader.read(&(&samples[0]).into()).await.unwrap(), image(0));
    let error = reader.read(&(&samples[1]).into()).await.unwrap_err();
    assert!(error.to_string().contains("row 1") && !error.is_transient(), "{error}");
    let small = Reader::new().with_limit(6).read(&(&samples[0]).into()).await.unwrap_err();
    assert!(small.to_string().contains("7 bytes"), "{small}");
}

#[tokio::test]
async fn runs_of_rows_are_read_whole_or_by_pages() {
    let large = |row: u64| vec![row as u8; 1 << 20];
    let column: ArrayRef = Arc::new(BinaryArray::from_iter_values((0..40).map(large)));
    for paged in [true, false] {
        let properties = WriterProperties::builder()
            .set_dictionary_enabled(false)
            .set_offset_index_disabled(!paged)
            .set_statistics_enabled(EnabledStatistics::Chunk)
            .build();
        let dataset = Dataset::with(vec![("image", Arc::clone(&column))], properties);
        let samples = dataset.list(&ListOptions::default()).await.unwrap();
        let reader = Reader::new();
        for row in [39, 0, 17, 16, 15, 1] {
            assert_eq!(reader.read(&(&samples[row as usize]).into()).await.unwrap(), large(row), "{paged} {row}");
        }
    }
}

#[tokio::test]
async fn an_image_in_many_rows_is_decoded_and_kept_once() {
    // An incompressible megabyte, 1,000 times: 1 GB of rows.
    let one: Vec<u8> = (0..1u32 << 15).flat_map(|i| *blake3::hash(&i.to_le_bytes()).as_bytes()).collect();
    let batch: ArrayRef = Arc::new(BinaryArray::from_iter_values(std::iter::repeat_n(&one, 100)));
    let batch = RecordBatch::try_from_iter_with_nullable([("image", batch, true)]).unwrap();
    for dictionary in [true, false] {
        let root = TempDir::new().unwrap();
        let path = root.path().join("train.parquet");
        let properties = WriterProperties::builder()
            .set_dictionary_enabled(dictionary)
            .set_dictionary_page_size_limit(2 << 20)
            .set_compression(parquet::basic::Compression::ZSTD(Default::default()))
            .set_offset_index_disabled(true)
            .build();
        let file = std::fs::File::create(&path).unwrap();
        let mut writer = ArrowWriter::try_new(file, batch.schema(), Some(properties)).unwrap();
        for _ in 0..if dictionary { 10 } else { 1 } {
            writer.write(&batch.slice(0, if dictionary { 100 } else { 50 })).unwrap();
        }
        writer.close().unwrap();
        let (cells, memory) = (Cells::new(256 << 20), Budget::new(512 << 20));
        let reader = Reader::new();
        let (store, path) = reader.locate_any(path.to_str().unwrap()).unwrap();
        for row in [0, 1, if dictionary { 999 } else { 49 }] {
            let cell = cells.read(&store, &path, None, row, "image", &memory).await.unwrap();
            assert!(cell == one, "{dictionary} {row}");
        }
        if dictionary {
            assert!(memory.peak() < 64 << 20, "{}", memory.peak());
        }
        // The image, and without a dictionary the compressed chunk too.
        let most = if dictionary { 2 << 20 } else { 54 << 20 };
        assert!(cells.kept() < most, "{dictionary}: {}", cells.kept());
        assert_eq!(memory.free(), 512 << 20);
    }
}

#[tokio::test]
async fn a_run_ends_when_it_is_large_enough_and_the_next_one_continues() {
    // Small rows and then large ones, in one row group without an index: no average fits both.
    let large = |row: u64| vec![row as u8; if row < 100 { 10 } else { 3 << 20 }];
    let column: ArrayRef = Arc::new(BinaryArray::from_iter_values((0..120).map(large)));
    let properties = WriterProperties::builder().set_dictionary_enabled(false).set_offset_index_disabled(true).build();
    let dataset = Dataset::with(vec![("image", column)], properties);
    let (cells, memory) = (Cells::new(256 << 20), Budget::new(256 << 20));
    let path = dataset.0.path().join("train.parquet");
    let (store, path) = Reader::new().locate_any(path.to_str().unwrap()).unwrap();
    for row in [119, 0, 99, 100, 110, 118] {
        let cell = cells.read(&store, &path, None, row, "image", &memory).await.unwrap();
        assert!(cell == large(row), "{row}");
    }
}

/// Hugging Face metadata of a column of classes.
fn with_classes(names: &str) -> WriterProperties {
    let noted = format!(r#"{{"info": {{"features": {{"label": {{"names": {names}, "_type": "ClassLabel"}}}}}}}}"#);
    WriterProperties::builder().set_key_value_metadata(Some(vec![KeyValue::new("huggingface".into(), noted)])).build()
}

fn labels(samples: &[Sample]) -> Vec<Option<&str>> {
    samples.iter().map(|sample| sample.label.as_deref()).collect()
}

#[tokio::test]
async fn a_column_of_classes_is_read_by_name_or_by_number_and_never_by_both() {
    let column = |values: Vec<Option<i64>>| -> ArrayRef { Arc::new(Int64Array::from(values)) };
    let known = |text: &str| Classes::parse(text, &[]).unwrap();
    let list = |classes: &'static str, values: Vec<Option<i64>>| async move {
        let dataset = Dataset::with(
            vec![("image", bytes(values.len() as u64)), ("label", column(values))],
            with_classes(r#"["cat", "dog", "owl"]"#),
        );
        let classes = known(classes);
        dataset.list(&ListOptions { classes: Some(&classes), ..ListOptions::default() }).await
    };
    // The job knows only some of the names: the others are still read as names.
    let samples = list("dog\ncat", vec![Some(0), Some(2), Some(1), Some(-1), None]).await.unwrap();
    assert_eq!(labels(&samples), [Some("cat"), Some("owl"), Some("dog"), None, None]);
    let samples = list("a\nb\nc", vec![Some(0), Some(2), Some(1)]).await.unwrap();
    assert_eq!(labels(&samples), [Some("0"), Some("2"), Some("1")]);
    let error = list("dog\ncat", vec![Some(7)]).await.unwrap_err().to_string();
    assert!(error.contains("row 0") && error.contains("label 7 is none of the 3 classes"), "{error}");
    // In other columns, -1 is an ordinary number.
    let dataset = Dataset::new(vec![("image", bytes(1)), ("label", column(vec![Some(-1)]))]);
    assert_eq!(labels(&dataset.list(&ListOptions::default()).await.unwrap()), [Some("-1")]);
}

#[tokio::test]
async fn labels_are_whole_numbers_or_names_and_other_types_are_reported() {
    let floats: ArrayRef = Arc::new(Float64Array::from(vec![Some(3.0), None, Some(f64::NAN), Some(-1.0)]));
    let dataset = Dataset::new(vec![("image", bytes(4)), ("label", floats)]);
    assert_eq!(labels(&dataset.list(&ListOptions::default()).await.unwrap()), [Some("3"), None, None, Some("-1")]);
    let half: ArrayRef = Arc::new(Float32Array::from(vec![0.5]));
    let error = Dataset::new(vec![("image", bytes(1)), ("label", half)]).error(&ListOptions::default()).await;
    assert!(error.contains("row 0") && error.contains("0.5 is not a whole number"), "{error}");

    let truths: ArrayRef = Arc::new(BooleanArray::from(vec![true, false]));
    let dataset = Dataset::new(vec![("image", bytes(2)), ("label", Arc::clone(&truths))]);
    let mut samples = Vec::new();
    let listed = list_source(dataset.0.path().to_str().unwrap(), &ListOptions::default(), &mut samples).await.unwrap();
    assert_eq!(labels(&samples), [None, None]);
    assert_eq!(
        listed.passed_over.to_string(),
        "row with an unusable label type (column label: boolean): 2 (train.parquet, ...)"
    );
    let named = LabelSource::from("column:label");
    let error = dataset.error(&ListOptions { label_from: Some(&named), ..ListOptions::default() }).await;
    assert!(error.contains("a column 'label' of type boolean, which can't be labels"), "{error}");
    // The next column that can hold labels is used.
    let dataset = Dataset::new(vec![("image", bytes(2)), ("label", truths), ("cls", strings(&[Some("a"), None]))]);
    assert_eq!(labels(&dataset.list(&ListOptions::default()).await.unwrap()), [Some("a"), None]);
}

#[tokio::test]
async fn each_row_may_have_an_image_or_a_path() {
    let images = || {
        structs(
            vec![Some(image(0)), None, Some(image(2)), None],
            &[Some("not there.png"), Some("1.png"), None, Some("sub/3.png")],
        )
    };
    for statistics in [EnabledStatistics::None, EnabledStatistics::Chunk] {
        let properties = WriterProperties::builder().set_statistics_enabled(statistics).build();
        let dataset = Dataset::with(
            vec![("image", images()), ("label", Arc::new(Int64Array::from_iter_values(0..4)))],
            properties,
        );
        std::fs::create_dir(dataset.0.path().join("sub")).unwrap();
        for (name, row) in [("1.png", 1), ("sub/3.png", 3)] {
            std::fs::write(dataset.0.path().join(name), image(row)).unwrap();
        }
        let mut samples = Vec::new();
        let source = dataset.0.path().join("train.parquet");
        list_source(source.to_str().unwrap(), &ListOptions::default(), &mut samples).await.unwrap();
        let keys: Vec<_> = samples.iter().map(|sample| sample.key.as_str()).collect();
        assert_eq!(keys, ["train.parquet/000000", "1.png", "train.parquet/000002", "sub/3.png"]);
        let reader = Reader::new();
        for (row, sample) in (0..).zip(&samples) {
            assert_eq!(reader.read(&sample.into()).await.unwrap(), image(row));
            assert_eq!(sample.label, Some(row.to_string()));
        }
    }
}

#[tokio::test]
async fn a_file_without_rows_is_an_error() {
    let error = Dataset::new(vec![("image", bytes(0))]).error(&ListOptions::default()).await;
    assert!(error.contains("there is no image in"), "{error}");
}
