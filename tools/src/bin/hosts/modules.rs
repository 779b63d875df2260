//! Kernel modules, with those they depend on.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::packages::{PackageError, Unpacked};

/// A module that can be loaded.
#[derive(Debug)]
pub(crate) struct Module {
    pub(crate) name: String,
    pub(crate) code: Vec<u8>,
}

/// Why there are no modules.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ModuleError {
    #[error(transparent)]
    Package(#[from] PackageError),
    #[error("{}: cannot read", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{}: cannot be unpacked", path.display())]
    Compressed { path: PathBuf },
    #[error("no module {name} in {}", folder.display())]
    Missing { name: String, folder: PathBuf },
}

/// The module `name` of `kernel` and all it depends on, in an order in which they can be loaded.
pub(crate) fn load_order(
    kernel: &Unpacked,
    busybox: &Path,
    name: &str,
) -> Result<Vec<Module>, ModuleError> {
    let folder = kernel.find("/lib/modules", "")?;
    let mut files = BTreeMap::new();
    collect(&folder.join("kernel"), &mut files)?;
    let mut modules = Vec::new();
    let mut take = |name: &str| {
        let path = files.get(name).ok_or_else(|| ModuleError::Missing {
            name: name.to_owned(),
            folder: folder.clone(),
        })?;
        read(path, busybox)
    };
    add(name, &mut take, &mut modules)?;
    Ok(modules)
}

/// Adds `name` to `modules`, behind what it depends on.
fn add(
    name: &str,
    take: &mut impl FnMut(&str) -> Result<Vec<u8>, ModuleError>,
    modules: &mut Vec<Module>,
) -> Result<(), ModuleError> {
    if modules.iter().any(|module| module.name == name) {
        return Ok(());
    }
    let code = take(name)?;
    for other in depends(&code) {
        add(&other, take, modules)?;
    }
    modules.push(Module {
        name: name.to_owned(),
        code,
    });
    Ok(())
}

/// All modules below `folder`, by name. File names have dashes where names may have underscores.
fn collect(folder: &Path, files: &mut BTreeMap<String, PathBuf>) -> Result<(), ModuleError> {
    let failed = |source| ModuleError::Read {
        path: folder.to_owned(),
        source,
    };
    for entry in fs::read_dir(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let path = entry.path();
        if entry.file_type().map_err(failed)?.is_dir() {
            collect(&path, files)?;
        } else if let Some((name, _)) = entry.file_name().to_string_lossy().split_once(".ko") {
            files.insert(name.replace('_', "-"), path);
        }
    }
    Ok(())
}

fn read(path: &Path, busybox: &Path) -> Result<Vec<u8>, ModuleError> {
    let compressed = || ModuleError::Compressed {
        path: path.to_owned(),
    };
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("ko") => fs::read(path).map_err(|source| ModuleError::Read {
            path: path.to_owned(),
            source,
        }),
        Some("xz") => {
            let mut xz = Command::new(busybox);
            xz.args(["xz", "-d", "-c"]).arg(path).stdin(Stdio::null());
            match xz.output() {
                Ok(output) if output.status.success() => Ok(output.stdout),
                _ => Err(compressed()),
            }
        }
        _ => Err(compressed()),
    }
}

/// What a module says it depends on: a list in its `.modinfo`, which is text.
fn depends(code: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = code.windows(KEY.len()).position(|window| window == KEY) else {
        return Vec::new();
    };
    let list = &code[at + KEY.len()..];
    let end = list.iter().position(|&byte| byte == 0);
    String::from_utf8_lossy(&list[..end.unwrap_or(list.len())])
        .split(',')
        .filter(|name| !name.is_empty())
        .map(|name| name.replace('_', "-"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_come_from_the_module_itself() {
        assert_eq!(
            depends(b"ELF\0license=GPL\0depends=kvm,rng_core\0x"),
            ["kvm", "rng-core"]
        );
        assert_eq!(depends(b"ELF\0depends=\0x").len(), 0);
        assert_eq!(depends(b"ELF").len(), 0);
    }

    #[test]
    fn what_is_depended_on_is_loaded_first_and_once() {
        let mut take = |name: &str| {
            let depends = match name {
                "kvm-amd" => "ccp,kvm",
                "ccp" => "rng_core",
                "kvm" => "irqbypass,rng_core",
                _ => "",
            };
            Ok(format!("\0depends={depends}\0").into_bytes())
        };
        let mut modules = Vec::new();
        add("kvm-amd", &mut take, &mut modules).unwrap();
        let names = Vec::from_iter(modules.iter().map(|module| module.name.as_str()));
        assert_eq!(names, ["rng-core", "ccp", "irqbypass", "kvm", "kvm-amd"]);
    }
}
