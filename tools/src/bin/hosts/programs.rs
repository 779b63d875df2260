//! The programs of this workspace, built by cargo as it builds them anyway.

use std::env;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};

use serde_json::Value;

/// The library, and so its unit tests.
pub(crate) const LIBRARY: &str = "palimpsest";

/// The tests of kept snapshots, some of which read files that are not in a host.
pub(crate) const KEPT: &str = "kept";

/// The programs that run in a host.
#[derive(Debug)]
pub(crate) struct Programs {
    /// `vmm`.
    pub(crate) vmm: PathBuf,
    /// Tests, by name: the programs of `tests/`, and the library's own.
    pub(crate) tests: Vec<(String, PathBuf)>,
}

impl Programs {
    /// The names of the tests.
    pub(crate) fn names(&self) -> Vec<String> {
        self.tests.iter().map(|(name, _)| name.clone()).collect()
    }
}

/// Why there are none.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BuildError {
    #[error("cannot run cargo")]
    Start(#[source] io::Error),
    #[error("cargo ended with {0}")]
    Failed(ExitStatus),
    #[error("cargo has not built {0}")]
    Missing(&'static str),
}

/// What is wanted of the workspace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// `vmm` alone.
    Program,
    /// The program and the tests.
    Tests,
}

/// Builds what is `wanted`. As part of the workspace, so that what its tests have built is not built
/// anew with fewer features.
pub(crate) fn build(wanted: Wanted) -> Result<Programs, BuildError> {
    let said = cargo(match wanted {
        Wanted::Program => &["build", "--workspace", "--bin", "vmm"],
        // Those of tests/ have their package's program built.
        Wanted::Tests => &["test", "--workspace", "--no-run", "--lib", "--test", "*"],
    })?;
    let artifacts = Vec::from_iter(said.lines().filter_map(artifact));
    let vmm = artifacts.iter().find(|artifact| artifact.kind == "bin");
    let is_test = |artifact: &&Artifact| match artifact.kind.as_str() {
        "test" => true,
        "lib" => artifact.name == LIBRARY,
        _ => false,
    };
    let tests = artifacts.iter().filter(is_test);
    let named = |artifact: &Artifact| (artifact.name.clone(), artifact.path.clone());
    let mut tests = Vec::from_iter(tests.map(named));
    // Cargo says what it has built in the order in which it was done with it.
    tests.sort();
    Ok(Programs {
        vmm: vmm.ok_or(BuildError::Missing("vmm"))?.path.clone(),
        tests,
    })
}

/// The folder of the workspace.
pub(crate) fn workspace() -> &'static Path {
    let tools = Path::new(env!("CARGO_MANIFEST_DIR"));
    tools.parent().unwrap_or(tools)
}

/// What cargo says of its work, a line of JSON each.
fn cargo(arguments: &[&str]) -> Result<String, BuildError> {
    let program = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(program);
    command
        .current_dir(workspace())
        .args(arguments)
        .arg("--message-format=json-render-diagnostics")
        .stdin(Stdio::null())
        .stderr(Stdio::inherit());
    let output = command.output().map_err(BuildError::Start)?;
    if !output.status.success() {
        return Err(BuildError::Failed(output.status));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A program that cargo has built.
#[derive(Debug, PartialEq, Eq)]
struct Artifact {
    name: String,
    /// The kind of target that it is, or is the unit tests of: `bin`, `test`, `lib`, ...
    kind: String,
    path: PathBuf,
}

fn artifact(line: &str) -> Option<Artifact> {
    let message: Value = serde_json::from_str(line).ok()?;
    let path = message["executable"].as_str()?;
    let target = &message["target"];
    // The program's own unit tests are a `bin`, too.
    let kind = target["kind"][0].as_str()?;
    let is_unit_tests = kind == "bin" && message["profile"]["test"] == true;
    (!is_unit_tests).then(|| Artifact {
        name: target["name"].as_str().unwrap_or_default().to_owned(),
        kind: kind.to_owned(),
        path: path.into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_told_from_what_cargo_says_besides() {
        let line = |kind: &str, test: bool, executable: &str| {
            format!(
                r#"{{"reason":"compiler-artifact","target":{{"kind":["{kind}"],"name":"n"}},"profile":{{"test":{test}}},"executable":{executable}}}"#
            )
        };
        let program = |kind: &str| Artifact {
            name: "n".to_owned(),
            kind: kind.to_owned(),
            path: "/t/n".into(),
        };
        assert_eq!(
            artifact(&line("bin", false, r#""/t/n""#)),
            Some(program("bin"))
        );
        assert_eq!(
            artifact(&line("test", true, r#""/t/n""#)),
            Some(program("test"))
        );
        assert_eq!(artifact(&line("bin", true, r#""/t/n""#)), None);
        assert_eq!(artifact(&line("lib", false, "null")), None);
        assert_eq!(
            artifact(&line("lib", true, r#""/t/n""#)),
            Some(program("lib"))
        );
        assert_eq!(
            artifact(r#"{"reason":"build-finished","success":true}"#),
            None
        );
        assert_eq!(artifact("not JSON"), None);
    }
}
