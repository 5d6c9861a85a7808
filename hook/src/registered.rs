//! The calls of our hook that `config.json` has, by whoever put them there: hooks.d, a CDI device, our runtime.

use serde::Deserialize;

/// The name by which every registration calls the hook, whatever its path: `args[0]`.
const NAME: &str = "ringfence-hook";

/// The hooks of `config.json`, as far as one can join a container.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Hooks {
    create_runtime: Option<Vec<Hook>>,
    prestart: Option<Vec<Hook>>,
}

#[derive(Debug, Deserialize)]
struct Hook {
    args: Option<Vec<String>>,
}

impl Hooks {
    /// The first policy that any call of ours is given: it is the engine's choice for the container, also for the calls that are
    /// not given it.
    pub(crate) fn policy(&self) -> Option<&str> {
        let hooks = [&self.prestart, &self.create_runtime].into_iter().flatten().flatten();
        hooks.filter_map(|hook| hook.args.as_deref()).find_map(policy)
    }
}

fn policy(args: &[String]) -> Option<&str> {
    let (name, rest) = args.split_first()?;
    match rest {
        _ if name != NAME => None,
        [_, option, policy] if option == "--policy" => Some(policy),
        [_, option] => option.strip_prefix("--policy="),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_engines_choice_is_found_among_all_hooks() {
        for (hooks, expected) in [
            (r#"{}"#, None),
            (r#"{"createRuntime": null, "prestart": [{"path": "/x"}]}"#, None),
            (r#"{"createRuntime": [{"path": "/x", "args": null}, {"path": "/x", "args": []}]}"#, None),
            (r#"{"createRuntime": [{"path": "/x", "args": ["ringfence-hook", "createRuntime"]}]}"#, None),
            (r#"{"createRuntime": [{"path": "/x", "args": ["other", "createRuntime", "--policy", "gold"]}]}"#, None),
            (
                r#"{"createRuntime": [{"path": "/x", "args": ["ringfence-hook", "createRuntime"]},
                    {"path": "/x", "args": ["ringfence-hook", "createRuntime", "--policy", "gold"]}]}"#,
                Some("gold"),
            ),
            (
                r#"{"prestart": [{"path": "/x", "args": ["ringfence-hook", "prestart", "--policy=gold"]}]}"#,
                Some("gold"),
            ),
            (r#"{"poststop": [{"path": "/x", "args": ["ringfence-hook", "poststop", "--policy=gold"]}]}"#, None),
        ] {
            let hooks: Hooks = serde_json::from_str(hooks).unwrap();
            assert_eq!(hooks.policy(), expected, "{hooks:?}");
        }
    }
}
