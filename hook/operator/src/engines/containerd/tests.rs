//! Real files, and generated ones.

use super::*;
use proptest::prelude::*;

const FILES: [(&str, &str); 9] = [
    ("debian", include_str!("../../../tests/containerd/debian.toml")),
    ("default-1.6", include_str!("../../../tests/containerd/default-1.6.toml")),
    ("default-1.7", include_str!("../../../tests/containerd/default-1.7.toml")),
    ("default-2.1", include_str!("../../../tests/containerd/default-2.1.toml")),
    ("kubernetes-systemd", include_str!("../../../tests/containerd/kubernetes-systemd.toml")),
    ("mirrors", include_str!("../../../tests/containerd/mirrors.toml")),
    ("nvidia", include_str!("../../../tests/containerd/nvidia.toml")),
    ("kata-only", include_str!("../../../tests/containerd/kata-only.toml")),
    ("imported", include_str!("../../../tests/containerd/imported.toml")),
];
const BINARY: &str = "/usr/bin/ringfence-runtime";

fn registration(set_as_default: bool) -> Registration {
    Registration { binary: BINARY.into(), set_as_default, runc: None }
}

/// The runtimes of `text`, taken out of it.
fn take_runtimes(text: &str) -> (toml::Table, toml::Table) {
    let mut all: toml::Table = toml::from_str(text).unwrap();
    let mut runtimes = toml::Table::new();
    let plugins = all.get_mut("plugins").and_then(|plugins| plugins.as_table_mut());
    for (name, plugin) in plugins.into_iter().flatten().filter(|(name, _)| name.contains("cri")) {
        if let Some(containerd) = plugin.get_mut("containerd").and_then(|containerd| containerd.as_table_mut()) {
            if let Some(found) = containerd.remove("runtimes") {
                runtimes.insert(name.clone(), found);
            }
            containerd.remove("default_runtime_name");
        }
    }
    (all, runtimes)
}

fn prune_empty(table: &mut toml::Table) {
    table.iter_mut().filter_map(|(_, value)| value.as_table_mut()).for_each(prune_empty);
    table.retain(|_, value| value.as_table().is_none_or(|table| !table.is_empty()));
}

#[track_caller]
fn check(name: &str, text: &str, set_as_default: bool) {
    let registration = registration(set_as_default);
    let new = configure(text, &registration).unwrap();
    assert_eq!(configure(&new, &registration).unwrap(), new, "{name}: a second time");
    assert_eq!(unconfigure(&new).unwrap().as_deref(), Some(text), "{name}: back");

    let file = File::parse(&new).unwrap();
    assert_eq!(defects(file.runtime(NAME).unwrap(), BINARY, None), Vec::<String>::new(), "{name}");
    assert_eq!(file.default_runtime() == Some(NAME), set_as_default, "{name}");
    // Every line of the old file is still there, in its order, but for the default runtime's.
    let mut lines = new.lines();
    for line in text.lines().filter(|line| !line.contains("default_runtime_name")) {
        assert!(lines.any(|new| new == line), "{name}: lost {line:?}");
    }
    let ((mut before, old), (mut after, mut runtimes)) = (take_runtimes(text), take_runtimes(&new));
    [&mut before, &mut after].into_iter().for_each(prune_empty);
    before.remove("version");
    after.remove("version");
    assert_eq!(before, after, "{name}: beside the runtimes");
    for (plugin, old) in old {
        let new = runtimes.get_mut(&plugin).and_then(|new| new.as_table_mut()).unwrap();
        old.as_table().unwrap().iter().for_each(|(key, value)| assert_eq!(new.get(key), Some(value), "{name}: {key}"));
    }
}

#[test]
fn real_files_keep_everything_and_come_back() {
    for (name, text) in FILES {
        check(name, text, false);
        check(name, text, true);
    }
}

#[test]
fn files_without_a_word_come_back() {
    for text in ["", "\n", "# nothing\n", "version = 3\n", "version = 2 # two\n# end\n"] {
        check(text, text, false);
        check(text, text, true);
    }
}

#[test]
fn dos_line_ends_stay() {
    let (_, text) = FILES[4];
    let text = text.replace('\n', "\r\n");
    check("crlf", &text, true);
    let new = configure(&text, &registration(true)).unwrap();
    assert_eq!(new.matches("\r\n").count(), new.matches('\n').count());
}

#[test]
fn a_new_file_is_removed_again() {
    for version in [2, 3] {
        let text = create(&registration(true), version).unwrap();
        assert_eq!(File::parse(&text).unwrap().version(), version);
        assert_eq!(unconfigure(&text).unwrap(), None);
        // What the administrator adds stays.
        let text = format!("{text}\n[timeouts]\nx = \"1s\"\n");
        let rest = unconfigure(&text).unwrap().unwrap();
        assert!(
            rest.starts_with(&format!("version = {version}")) && rest.ends_with("[timeouts]\nx = \"1s\"\n"),
            "{rest}"
        );
        assert!(!rest.contains("plugins"), "{rest}");
    }
}

#[test]
fn runc_stays_where_containerd_would_drop_it() {
    let runtime = |text: &str, name: &str| {
        let new = configure(text, &registration(false)).unwrap();
        File::parse(&new)
            .unwrap()
            .runtime(name)
            .map(|runtime| runtime.get("runtime_type").unwrap().as_str().unwrap().to_owned())
    };
    assert_eq!(runtime("version = 2\n", "runc").as_deref(), Some(RUNTIME_TYPE));
    // There the built-in one is gone already; to bring it back is not ours.
    let (_, kata) = FILES[7];
    assert_eq!(runtime(kata, "runc"), None);
    assert_eq!(runtime("version = 3\n", "runc"), None);
}

#[test]
fn options_of_runc_are_ours_too() {
    let new = configure(FILES[4].1, &registration(false)).unwrap();
    let file = File::parse(&new).unwrap();
    let ours = file.runtime(NAME).unwrap();
    let options = ours.get("options").and_then(Item::as_table_like).unwrap();
    assert_eq!(options.get("SystemdCgroup").and_then(Item::as_bool), Some(true));
    assert_eq!(ours.get("base_runtime_spec").and_then(Item::as_str), Some("/etc/containerd/base.json"));

    // runc's table in another file of the same configuration.
    let runc = File::parse(FILES[4].1).unwrap().runc();
    let new = configure("version = 3\n", &Registration { runc, ..registration(false) }).unwrap();
    assert!(new.contains("SystemdCgroup = true"), "{new}");
}

#[test]
fn the_former_default_comes_back() {
    let (_, nvidia) = FILES[6];
    let new = configure(nvidia, &registration(true)).unwrap();
    let line = new.lines().find(|line| line.contains("default_runtime_name")).unwrap();
    assert_eq!(
        line,
        "      default_runtime_name = \"ringfence\" # ringfence configure: was 'nvidia';  # by nvidia-ctk"
    );
}

#[test]
fn registrations_are_brought_up_to_date() {
    let old = Registration { binary: "/opt/ringfence-runtime".into(), ..registration(false) };
    let text = configure(FILES[4].1, &old).unwrap();
    let new = configure(&text, &registration(false)).unwrap();
    assert!(!new.contains("/opt/ringfence-runtime"), "{new}");
    assert_eq!(unconfigure(&new).unwrap().as_deref(), Some(FILES[4].1));
}

#[test]
fn what_cannot_be_edited_is_refused_in_one_line() {
    #[track_caller]
    fn case(text: &str, expected: &str) {
        let error = format!("{:#}", configure(text, &registration(true)).unwrap_err());
        assert!(error.contains(expected) && !error.contains('\n'), "{error}");
    }
    case("version = 2\nroot = \n", "line 2: ");
    case("[plugins.cri]\n", "its format is version 1");
    case("version = 9\n", "its format is version 9");
    case("version = 2\nplugins = 1\n", "its plugins is not a table");
    let cri = "[plugins.\"io.containerd.grpc.v1.cri\".containerd]\n";
    case(&format!("version = 2\n{cri}runtimes = {{ runc = {{}} }}\n"), "inline table");
    case(&format!("version = 2\n{cri}runtimes.runc.runtime_type = \"x\"\n"), "dotted keys");
    case(&format!("version = 2\n{cri}default_runtime_name = 7\n"), "cannot be understood");
    case(
        &format!("version = 2\n{cri}[plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.ringfence]\n"),
        "not ours to change",
    );
}

#[test]
fn defects_are_named() {
    let all = |text: &str| {
        let table: DocumentMut = text.parse().unwrap();
        defects(table.as_table(), BINARY, Some("/usr/bin/containerd-shim-ringfence-v2"))
    };
    let good =
        "runtime_type = \"io.containerd.runc.v2\"\npod_annotations = [\"ringfence.dev/*\", \"*.ringfence.dev/*\"]\n";
    assert_eq!(all(&format!("{good}options = {{ BinaryName = {BINARY:?} }}")), Vec::<String>::new());
    assert_eq!(all(&format!("{good}runtime_path = \"/usr/bin/containerd-shim-ringfence-v2\"")), Vec::<String>::new());
    let [defect] = &all(&format!("{good}options = {{ BinaryName = \"/gone\" }}"))[..] else { panic!() };
    assert!(defect.contains("\"/gone\""), "{defect}");
    // A star does not match a slash.
    let slashless = good.replace("ringfence.dev/*", "ringfence.dev*");
    let defects = all(&format!("{slashless}options = {{ BinaryName = {BINARY:?} }}"));
    assert!(defects.iter().any(|defect| defect.contains("ringfence.dev/enable")), "{defects:?}");
    let custom = good.replace("io.containerd.runc.v2", "io.containerd.ringfence.v2");
    let [defect] = &all(&format!("{custom}options = {{ SystemdCgroup = true }}"))[..] else { panic!() };
    assert!(defect.contains("cannot have options"), "{defect}");
}

fn key() -> impl Strategy<Value = String> {
    prop_oneof!["[a-z]{1,4}", "[a-z]{1,3}\\.[a-z]{1,3}".prop_map(|key| format!("{key:?}"))]
}

fn scalar() -> impl Strategy<Value = String> {
    prop_oneof![
        any::<i32>().prop_map(|number| number.to_string()),
        any::<bool>().prop_map(|bool| bool.to_string()),
        "[ -!#-&(-~]{0,8}".prop_map(|text| format!("'{text}'")),
        "[a-z]{0,3}".prop_map(|text| format!("[ '{text}',\n  2 ]")),
    ]
}

/// A file of tables with distinct names, indented and commented anyhow.
fn file() -> impl Strategy<Value = String> {
    let plugin = prop_oneof![
        Just("\"io.containerd.grpc.v1.cri\"".to_owned()),
        Just("'io.containerd.grpc.v1.cri'.containerd".to_owned()),
        Just("\"io.containerd.grpc.v1.cri\".containerd.runtimes.runc.options".to_owned()),
        Just("\"io.containerd.grpc.v1.cri\".containerd.runtimes.kata".to_owned()),
        key(),
    ];
    let values = prop::collection::btree_map(
        key().prop_map(|key| format!("k-{}", key.replace(['"', '.'], "_"))),
        scalar(),
        0..4,
    );
    let comment = prop_oneof![Just(""), Just("\n"), Just("# comment\n"), Just("   # x\n\n")];
    let table = (plugin, values, comment, "[ \t]{0,4}");
    (prop::collection::vec(table, 0..6), 2..4).prop_map(|(tables, version)| {
        let mut seen = std::collections::HashSet::new();
        let mut text = format!("# top\nversion = {version}\n");
        for (name, values, comment, indent) in tables {
            if seen.insert(name.replace(['"', '\''], "")) {
                text += &format!("{comment}{indent}[plugins.{name}]\n");
                values.iter().for_each(|(key, value)| text += &format!("{indent}{key} = {value} # {key}\n"));
            }
        }
        text + "# end\n"
    })
}

proptest! {
    #[test]
    fn generated_files_keep_everything_and_come_back(text in file(), set_as_default: bool) {
        prop_assume!(File::parse(&text).is_ok());
        check("generated", &text, set_as_default);
    }
}
