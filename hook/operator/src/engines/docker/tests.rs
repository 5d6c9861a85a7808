use super::*;
use proptest::prelude::*;

fn registration(policy: &str, set_as_default: bool) -> Registration {
    Registration {
        binary: "/usr/bin/ringfence-runtime".into(),
        policy: policy.into(),
        has_link: policy == "default",
        set_as_default,
    }
}

const NVIDIA: &str = r#"{
    "log-driver": "journald",
    "runtimes": {
        "nvidia": {
            "args": [],
            "path": "nvidia-container-runtime"
        }
    },
    "default-address-pools": [ {"base": "10.0.0.0/8", "size": 24} ],
    "max-download-attempts": 1e1
}
"#;

#[test]
fn files_come_back_as_they_were_written() {
    for text in [NVIDIA, "{\n\t\"debug\": true\n}", "{\"debug\":true,\"mtu\":1450}", "{\r\n  \"mtu\": 1.50\r\n}\r\n"] {
        for set_as_default in [false, true] {
            let new = configure(text, &registration("default", set_as_default)).unwrap();
            assert_ne!(new, text);
            assert_eq!(configure(&new, &registration("default", set_as_default)).unwrap(), new, "a second time");
            assert_eq!(unconfigure(&new).unwrap().as_deref(), Some(text), "back");
        }
    }
}

#[test]
fn a_runtime_is_added_in_the_file_s_style() {
    let new = configure(NVIDIA, &registration("gold", false)).unwrap();
    let expected = NVIDIA.replace(
        "        }\n    },",
        "        },\n        \"ringfence-gold\": {\"path\":\"/usr/bin/ringfence-runtime\",\"runtimeArgs\":[\"--ringfence-policy\",\"gold\"]}\n    },",
    );
    assert_eq!(new, expected);
    assert_eq!(registered(&new).unwrap(), [("ringfence-gold".to_owned(), "/usr/bin/ringfence-runtime".into())]);
}

#[test]
fn a_link_needs_no_arguments() {
    let new = configure("", &registration("default", false)).unwrap();
    let value: Value = serde_json::from_str(&new).unwrap();
    assert_eq!(value["runtimes"]["ringfence"], json!({"path": "/usr/bin/ringfence-runtime-default"}));
    // Of a time without the link, or after it.
    let without = Registration { has_link: false, ..registration("default", false) };
    let old = configure("", &without).unwrap();
    assert_eq!(configure(&old, &registration("default", false)).unwrap(), new);
    assert_eq!(configure(&new, &without).unwrap(), old);
    let foreign = r#"{"runtimes": {"ringfence": {"path": "/usr/bin/ringfence-runtimes"}}}"#;
    assert!(configure(foreign, &without).unwrap_err().to_string().contains("is not ringfence-runtime"));
}

#[test]
fn profiles_stand_side_by_side() {
    let one = configure("", &registration("default", false)).unwrap();
    let two = configure(&one, &registration("gold", true)).unwrap();
    let names: Vec<_> = registered(&two).unwrap().into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["ringfence", "ringfence-gold"]);
    let value: Value = serde_json::from_str(&two).unwrap();
    assert_eq!(value["default-runtime"], "ringfence-gold");
    assert_eq!(unconfigure(&two).unwrap(), None);
}

#[test]
fn blank_files_are_empty_objects() {
    for text in ["", " \n", "null\n", "{}", "{ }\n"] {
        let new = configure(text, &registration("default", false)).unwrap();
        assert_eq!(registered(&new).unwrap().len(), 1, "{text:?}");
        assert_eq!(unconfigure(&new).unwrap(), None, "{text:?}");
        assert_eq!(unconfigure(text).unwrap().as_deref(), Some(text));
    }
}

#[test]
fn what_cannot_be_edited_is_refused_in_one_line() {
    #[track_caller]
    fn case(text: &str, expected: &str) {
        let error = format!("{:#}", configure(text, &registration("default", true)).unwrap_err());
        assert!(error.contains(expected) && !error.contains('\n'), "{error}");
    }
    case("{\n  \"debug\": tru\n}", "expected ident at line 3");
    case("[]", "expected an object");
    case("{\"a\": 1, \"a\": 2}", "\"a\" is there twice");
    case("{\"runtimes\": []}", "its \"runtimes\"");
    case("{\"default-runtime\": \"nvidia\"}", "its default-runtime is \"nvidia\"");
    case("{\"runtimes\": {\"ringfence\": {\"path\": \"/bin/other\"}}}", "is not ringfence-runtime");
    case("{} // comment", "line 1 column 4");
}

#[test]
fn a_moved_program_is_followed() {
    let old = Registration { binary: "/opt/ringfence-runtime".into(), ..registration("default", false) };
    let new = configure(&configure(NVIDIA, &old).unwrap(), &registration("default", false)).unwrap();
    assert!(!new.contains("/opt/"), "{new}");
    assert_eq!(unconfigure(&new).unwrap().as_deref(), Some(NVIDIA));
}

fn value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        "[ -~]{0,6}".prop_map(Value::from),
        Just(Value::Null),
    ];
    leaf.prop_recursive(3, 16, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map("[a-z]{1,4}", inner, 0..4).prop_map(|map| map.into_iter().collect()),
        ]
    })
}

proptest! {
    #[test]
    fn every_other_key_stays(members in prop::collection::btree_map("[a-z\"\\\\-]{1,8}", value(), 0..5), pretty: bool, set: bool) {
        let before: Value = members.into_iter().filter(|(key, _)| key != "runtimes").collect::<serde_json::Map<_, _>>().into();
        let text = if pretty { format!("{before:#}\n") } else { before.to_string() };
        let new = configure(&text, &registration("default", set)).unwrap();
        let mut after: Value = serde_json::from_str(&new).unwrap();
        let object = after.as_object_mut().unwrap();
        prop_assert!(object.remove("runtimes").is_some());
        object.remove("default-runtime");
        prop_assert_eq!(&after, &before);
        let back = unconfigure(&new).unwrap();
        prop_assert_eq!(back, Some(text).filter(|_| before != serde_json::json!({})));
    }
}
