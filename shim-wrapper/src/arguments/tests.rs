use super::*;
use proptest::prelude::*;

fn parse(line: &str) -> Invocation {
    Invocation::parse(OsStr::new("ringfence-runtime"), line.split_whitespace().map(OsString::from))
}

#[track_caller]
fn config(line: &str, verb: Verb, config: &str) {
    let found = parse(line);
    assert_eq!((found.verb, found.config.to_str().unwrap()), (verb, config), "{line}");
    assert_eq!(found.arguments.join(OsStr::new(" ")), line, "{line}");
}

#[test]
fn verbs_and_bundles() {
    use Verb::{Make, Other, Restore};
    for (line, verb, path) in [
        ("", Other, "config.json"),
        ("--version", Other, "config.json"),
        ("-v", Other, "config.json"),
        ("features", Other, "config.json"),
        ("--root create features", Other, "config.json"),
        ("create c1", Make, "config.json"),
        ("run c1", Make, "config.json"),
        ("create --bundle /b c1", Make, "/b/config.json"),
        ("create --bundle=/b c1", Make, "/b/config.json"),
        ("create -bundle /b c1", Make, "/b/config.json"),
        ("create -bundle=/b c1", Make, "/b/config.json"),
        ("create -b /b c1", Make, "/b/config.json"),
        ("create -b=/b c1", Make, "/b/config.json"),
        ("create --b /b c1", Make, "/b/config.json"),
        ("create --bun=/b c1", Make, "/b/config.json"),
        ("create c1 --bundle /b", Make, "/b/config.json"),
        ("create -b/b c1", Make, "/b/config.json"),
        ("run -db /b c1", Make, "/b/config.json"),
        ("run -d -b rel c1", Make, "rel/config.json"),
        ("create -b /a --bundle /b c1", Make, "/b/config.json"),
        ("create -- --bundle /b", Make, "config.json"),
        ("create --pid-file --bundle c1", Make, "config.json"),
        ("create --new-flag --bundle /b c1", Make, "/b/config.json"),
        ("create --new-flag=x -b /b c1", Make, "/b/config.json"),
        ("create --bundle", Make, "config.json"),
        ("run -b /b -f other.json c1", Make, "/b/other.json"),
        ("run -b /b --config=/c.json c1", Make, "/c.json"),
        ("create --help", Other, "config.json"),
        ("restore --image-path run -b /b c1", Restore, "/b/config.json"),
        ("--root /r --log /l --log-format json --systemd-cgroup create -b /b c1", Make, "/b/config.json"),
        ("-root /r --log=/l -debug create -b /b c1", Make, "/b/config.json"),
        ("--root create --rootless=true run -b /b c1", Make, "/b/config.json"),
        ("--log-l debug run -b /b c1", Make, "/b/config.json"),
        ("--new-bool create -b /b c1", Make, "/b/config.json"),
        ("--new value create -b /b c1", Make, "/b/config.json"),
        ("--new=value create -b /b c1", Make, "/b/config.json"),
        ("--new --newer create -b /b c1", Make, "/b/config.json"),
        ("-- create -b /b c1", Make, "/b/config.json"),
        ("exec -b /b c1 create", Other, "config.json"),
        ("kill run", Other, "config.json"),
        ("- create", Other, "config.json"),
        ("--root", Other, "config.json"),
    ] {
        config(line, verb, path);
    }
}

#[test]
fn logs() {
    let log = |path: Option<&str>, json| Log { path: path.map(PathBuf::from), json };
    for (line, expected) in [
        ("create c1", log(None, false)),
        ("--log /l create c1", log(Some("/l"), false)),
        ("--log=/l --log-format=json create c1", log(Some("/l"), true)),
        ("--log-format json --log /l state c1", log(Some("/l"), true)),
        ("--log /l --log-format text create c1", log(Some("/l"), false)),
        ("--log file:/l create c1", log(Some("/l"), false)),
        ("--log journald:c1 create c1", log(None, false)),
        ("--log syslog:c1 create c1", log(None, false)),
        ("--log /dev/stderr create c1", log(None, false)),
        ("--log= create c1", log(None, false)),
        ("create --log /l c1", log(None, false)),
    ] {
        assert_eq!(parse(line).log, expected, "{line}");
    }
}

#[test]
fn cgroups() {
    for (line, expected) in [
        ("create c1", false),
        ("--systemd-cgroup create c1", true),
        ("--systemd-cgroup=false create c1", true),
        ("-systemd-cgroup create c1", true),
        ("--cgroup-manager=cgroupfs create c1", true),
        ("--cgroup-manager disabled create c1", true),
        ("--root --systemd-cgroup create c1", false),
    ] {
        assert_eq!(parse(line).manages_cgroups, expected, "{line}");
    }
    let mut invocation = parse("--root /r create -b /b c1");
    invocation.add_global("--systemd-cgroup");
    assert_eq!(invocation.arguments.join(OsStr::new(" ")), "--root /r --systemd-cgroup create -b /b c1");
}

#[test]
fn the_policy_is_ours_alone() {
    for line in [
        "--ringfence-policy gold --root /r create -b /b c1",
        "--ringfence-policy=gold --root /r create -b /b c1",
        "--root /r -ringfence-policy gold create -b /b c1",
        "--ringfence-policy lead --root /r -ringfence-policy=gold create -b /b c1",
    ] {
        let found = parse(line);
        assert_eq!(found.policy, Ok(Some("gold".into())), "{line}");
        assert_eq!(found.arguments.join(OsStr::new(" ")), "--root /r create -b /b c1");
    }
    for line in ["--ringfence-policy", "--ringfence-policy= create c1"] {
        let message = parse(line).policy.unwrap_err().message;
        assert!(message.starts_with("--ringfence-policy ") && message.contains("profile"), "{message}");
    }
}

#[test]
fn a_link_s_name_says_the_policy() {
    let parse = |called: &str, line: &str| {
        let found = Invocation::parse(called.as_ref(), line.split_whitespace().map(OsString::from));
        assert_eq!(found.arguments.last().unwrap(), "c1");
        found.policy.unwrap()
    };
    for (called, line, expected) in [
        ("/usr/bin/ringfence-runtime-default", "create c1", Some("default")),
        ("ringfence-runtime-big-data.1", "--root /r create c1", Some("big-data.1")),
        ("/x/ringfence-runtime-gold", "--ringfence-policy lead create c1", Some("lead")),
        ("/x/ringfence-runtime-gold", "--ringfence-policy=lead delete c1", Some("lead")),
        ("/ringfence-runtime-gold/ringfence-runtime", "create c1", None),
        ("/usr/bin/ringfence-runtime-", "create c1", None),
        ("runc", "create c1", None),
        ("", "create c1", None),
    ] {
        assert_eq!(parse(called, line).as_deref(), expected, "{called} {line}");
    }
}

fn word() -> impl Strategy<Value = String> {
    prop_oneof![
        3 => "[ -~]{0,12}",
        1 => proptest::sample::select(VERBS.to_vec()).prop_map(String::from),
        2 => (proptest::sample::select([&GLOBAL[..], &LOCAL[..]].concat()), "-{1,2}", "(=[a-z/]{0,4})?")
            .prop_map(|((name, _), dashes, value)| format!("{dashes}{name}{value}")),
    ]
}

proptest! {
    #[test]
    fn the_runtime_gets_all_that_is_not_ours(words in proptest::collection::vec(word(), 0..12)) {
        let mut kept: Vec<_> = words.iter().map(OsString::from).collect();
        let found = Invocation::parse(OsStr::new(""), kept.clone());
        if !words.iter().any(|word| word.contains(POLICY_FLAG)) {
            prop_assert_eq!(&found.arguments, &kept);
        }
        // In order, and nothing invented.
        for argument in found.arguments {
            let at = kept.iter().position(|word| *word == argument);
            prop_assert!(at.is_some());
            kept.drain(..=at.unwrap());
        }
    }

    #[test]
    fn arguments_need_not_be_text(bytes in proptest::collection::vec(any::<u8>(), 1..20)) {
        let argument = OsString::from_vec(bytes);
        let given = [OsString::from("--log"), argument.clone(), "create".into(), "-b".into(), argument.clone()];
        let found = Invocation::parse(OsStr::new(""), given.clone());
        prop_assert_eq!(found.arguments, given);
        prop_assert_eq!(found.config, Path::new(&argument).join("config.json"));
    }
}
