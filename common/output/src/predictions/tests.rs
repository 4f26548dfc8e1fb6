//! Tables of predictions, errors and quarantine.

use super::*;

fn rows() -> Vec<Prediction> {
    let score = |class, std_error| Score {
        class: ClassIndex(class),
        mean_error: 0.25 + class as f32,
        std_error,
        n: 20,
        round: Round(1),
    };
    let labelled = Outcome::Labelled(Labelled {
        class: ClassIndex(7),
        class_name: "cat".into(),
        confidence: Some(0.9),
        margin: None,
        scores: vec![score(7, Some(0.01)), score(2, None)],
    });
    let row = |sample, key: &str, label: Option<&str>, outcome| Prediction {
        sample: SampleId(sample),
        key: key.into(),
        label: label.map(str::to_owned),
        evaluations: 40,
        outcome,
    };
    vec![
        row(0, "cat/0.png", Some("cat"), labelled.clone()),
        row(1, "bad.png", None, Outcome::Quarantined { error: "decoding: not an image".into() }),
        row(2, "ö/ü.png", None, labelled),
    ]
}

#[test]
fn predictions_survive_parquet_and_their_bytes_depend_only_on_the_rows() {
    let meta = [("fingerprint".to_owned(), "abc".to_owned())];
    let bytes = encode_predictions(&rows(), &meta).unwrap();
    assert_eq!(bytes, encode_predictions(&rows(), &meta).unwrap());
    assert_eq!(decode_predictions(bytes).unwrap(), rows());
}

#[test]
fn metadata_is_stored_in_the_file() {
    let meta = [("fingerprint".to_owned(), "abc".to_owned())];
    let bytes = encode_predictions(&rows(), &meta).unwrap();
    let metadata = table::metadata::<Predictions>(&bytes).unwrap();
    let pairs = metadata.metadata().file_metadata().key_value_metadata().unwrap();
    assert!(pairs.iter().any(|kv| kv.key == "fingerprint" && kv.value.as_deref() == Some("abc")));
}

#[test]
fn readers_can_skip_by_every_column_and_large_files_have_several_row_groups() {
    let scores = vec![Score { class: ClassIndex(2), mean_error: 0.5, std_error: None, n: 1, round: Round(0) }; 1000];
    let rows: Vec<_> = (0..2000)
        .map(|i| Prediction {
            sample: SampleId(i),
            key: format!("{i:05}.png"),
            outcome: Outcome::Labelled(Labelled {
                class: ClassIndex(i as i32 / 1000),
                class_name: "cat".into(),
                confidence: None,
                margin: Some(0.5),
                scores: scores.clone(),
            }),
            ..rows()[0].clone()
        })
        .collect();
    let metadata = table::metadata::<Predictions>(&encode_predictions(&rows, &[]).unwrap()).unwrap();
    let groups = metadata.metadata().row_groups();
    assert_eq!(groups.iter().map(|group| group.num_rows()).collect::<Vec<_>>(), [1048, 952]);
    let bounds = |group: usize, name: &str| {
        let columns = groups[group].columns().iter();
        let column = columns.clone().find(|column| column.column_path().string() == name).unwrap();
        let statistics = column.statistics().unwrap();
        (statistics.min_bytes_opt().unwrap().to_vec(), statistics.max_bytes_opt().unwrap().to_vec())
    };
    let numbers = |from: u64, to: u64| (from.to_le_bytes().to_vec(), to.to_le_bytes().to_vec());
    assert_eq!(bounds(1, "sample_id"), numbers(1048, 1999));
    assert_eq!(bounds(1, "predicted_index"), (1i32.to_le_bytes().to_vec(), 1i32.to_le_bytes().to_vec()));
    assert_eq!(bounds(0, "key"), (b"00000.png".to_vec(), b"01047.png".to_vec()));
    for name in ["margin", "status", "scores.list.element.class_index", "scores.list.element.mean_error"] {
        bounds(0, name);
    }
    assert_eq!(groups[0].sorting_columns().unwrap()[0].column_idx, 0);
    assert!(groups[0].columns().iter().all(|c| matches!(c.compression(), parquet::basic::Compression::ZSTD(_))));
}

#[test]
fn a_table_without_rows_is_valid() {
    assert_eq!(decode_predictions(encode_predictions(&[], &[]).unwrap()).unwrap(), []);
    assert_eq!(decode_errors(encode_errors(&[], &[]).unwrap()).unwrap(), []);
    assert_eq!(decode_quarantine(encode_quarantine(&[], &[]).unwrap()).unwrap(), []);
}

#[test]
fn errors_and_quarantine_survive_parquet() {
    let errors: Vec<_> = (0..3000u32)
        .map(|i| ErrorRow {
            sample: SampleId(u64::from(i) / 10),
            class: ClassIndex(-1),
            prompt: PromptIndex(i % 10),
            timestep: 999 - i % 1000,
            noise: i,
            error: i as f32 / 7.0,
        })
        .collect();
    assert_eq!(decode_errors(encode_errors(&errors, &[]).unwrap()).unwrap(), errors);
    let quarantined = vec![Quarantined {
        sample: SampleId(9),
        key: "a.png".into(),
        stage: FailureStage::Decode,
        error: "truncated".into(),
        attempts: 3,
    }];
    assert_eq!(decode_quarantine(encode_quarantine(&quarantined, &[]).unwrap()).unwrap(), quarantined);
}

#[test]
fn other_files_are_refused_with_the_column_that_differs() {
    let not_parquet = decode_predictions(Bytes::from_static(b"hello")).unwrap_err().to_string();
    assert!(not_parquet.contains("reading the predictions") && not_parquet.contains("delete it"), "{not_parquet}");
    let other = decode_quarantine(
        encode_errors(
            &[ErrorRow {
                sample: SampleId(0),
                class: ClassIndex(0),
                prompt: PromptIndex(0),
                timestep: 0,
                noise: 0,
                error: 0.0,
            }],
            &[],
        )
        .unwrap(),
    );
    assert!(other.unwrap_err().to_string().contains("column 'key' is missing"));
}
