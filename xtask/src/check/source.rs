//! Reads the modules of a crate and the paths in them from the source.
//!
//! Test code is ignored: a module, item or method behind `cfg(test)` counts as absent. Paths are
//! found where `syn` parses one (`use`, expressions, types, patterns) and, word by word, in the
//! tokens of macros and attributes.

mod paths;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use syn::visit::Visit;
use syn::{Attribute, Item, ItemMod, Meta};

use paths::{Paths, is_for_tests};
pub(super) use paths::{is_test_item, is_test_member};

/// How many `use` declarations a name is followed through before it counts as unknown.
const MAX_HOPS: usize = 8;

/// The files of one package's library or program, or of both.
pub(super) struct Crate {
    /// The package's name.
    pub(super) name: String,
    /// Parents come before their children.
    pub(super) modules: Vec<Module>,
}

/// One module; an inline one shares the file of its parent.
pub(super) struct Module {
    /// The names from the root of the crate to this module; empty for the root.
    pub(super) path: Vec<String>,
    /// The module that `crate` means here: `main` in the program of a package with a library.
    root: Vec<String>,
    /// The path relative to the workspace.
    pub(super) file: PathBuf,
    /// The names of the child modules, without tests.
    children: BTreeSet<String>,
    /// The path of each imported name, as written.
    imports: BTreeMap<String, Vec<String>>,
    pub(super) written: Vec<Written>,
}

/// A path as written; a `use` list is expanded into one path for each name.
pub(super) struct Written {
    pub(super) segments: Vec<String>,
    pub(super) line: usize,
}

/// The target of a path.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Target {
    /// An item of this module of the crate.
    Module(Vec<String>),
    /// An item of another crate, or of the same file.
    Elsewhere(Vec<String>),
}

impl Crate {
    /// Reads the package whose directory this is, relative to `root`.
    pub(super) fn read(root: &Path, dir: &Path, name: &str) -> Result<Self> {
        let source = dir.join("src");
        let library = source.join("lib.rs");
        let program = source.join("main.rs");
        let mut modules = Vec::new();
        let has_library = root.join(&library).is_file();
        let mut reader = Reader { root, extern_name: None, modules: &mut modules };
        if has_library {
            reader.file(&library, &source, Vec::new(), Vec::new())?;
            reader.extern_name = Some(name.replace('-', "_"));
        }
        if root.join(&program).is_file() {
            let path = if has_library { vec!["main".to_owned()] } else { Vec::new() };
            reader.file(&program, &source, path.clone(), path)?;
        }
        if modules.is_empty() {
            bail!("{} has neither lib.rs nor main.rs", source.display());
        }
        Ok(Self { name: name.to_owned(), modules })
    }

    /// The target of a path in `module`.
    pub(super) fn target(&self, module: &Module, written: &[String]) -> Target {
        let mut path = match absolute(module, written) {
            Target::Module(path) => path,
            elsewhere => return elsewhere,
        };
        // A name that the module found there only imports is followed to its own module.
        for _ in 0..MAX_HOPS {
            let owner = self.owner(&path);
            let Some(next) = path.get(owner.path.len()) else { break };
            let Some(import) = owner.imports.get(next) else { break };
            match absolute_once(owner, import) {
                Target::Module(mut target) => {
                    target.extend_from_slice(&path[owner.path.len() + 1..]);
                    if target == path {
                        break;
                    }
                    path = target;
                }
                elsewhere => return elsewhere,
            }
        }
        Target::Module(self.owner(&path).path.clone())
    }

    /// The deepest module that the path goes through.
    fn owner(&self, path: &[String]) -> &Module {
        let holds = |module: &&Module| path.starts_with(&module.path);
        let deepest = self.modules.iter().filter(holds).max_by_key(|module| module.path.len());
        // The root holds every path, and is the first of at least one.
        deepest.unwrap_or(&self.modules[0])
    }
}

/// The path from the root of the crate, or with its first name expanded from outside.
fn absolute(module: &Module, written: &[String]) -> Target {
    let mut written = written.to_vec();
    for _ in 0..MAX_HOPS {
        match absolute_once(module, &written) {
            Target::Module(path) => return Target::Module(path),
            Target::Elsewhere(path) => {
                let Some(import) = path.first().and_then(|name| module.imports.get(name)) else {
                    return Target::Elsewhere(path);
                };
                let mut expanded = import.clone();
                expanded.extend_from_slice(&path[1..]);
                if expanded == written {
                    return Target::Elsewhere(path);
                }
                written = expanded;
            }
        }
    }
    Target::Elsewhere(written)
}

/// Resolves `crate`, `self`, `super` and the names of child modules.
fn absolute_once(module: &Module, written: &[String]) -> Target {
    let Some(first) = written.first() else { return Target::Elsewhere(Vec::new()) };
    let mut base = match first.as_str() {
        "crate" => module.root.clone(),
        "self" | "super" => module.path.clone(),
        name if module.children.contains(name) => {
            let mut path = module.path.clone();
            path.extend_from_slice(written);
            return Target::Module(path);
        }
        _ => return Target::Elsewhere(written.to_vec()),
    };
    let mut rest = written;
    while let Some((word, after)) = rest.split_first() {
        match word.as_str() {
            "crate" | "self" => {}
            "super" => {
                base.pop();
            }
            _ => break,
        }
        rest = after;
    }
    base.extend_from_slice(rest);
    Target::Module(base)
}

struct Reader<'a> {
    root: &'a Path,
    /// The name by which the package's program refers to its library.
    extern_name: Option<String>,
    modules: &'a mut Vec<Module>,
}

impl Reader<'_> {
    /// Reads a file and the files of its modules, which are below `below`.
    fn file(
        &mut self,
        file: &Path,
        below: &Path,
        path: Vec<String>,
        root: Vec<String>,
    ) -> Result<()> {
        let absolute = self.root.join(file);
        let text = fs::read_to_string(&absolute)
            .with_context(|| format!("cannot read {}", file.display()))?;
        let syntax = syn::parse_file(&text)
            .map_err(|error| anyhow::anyhow!("{}: {error}", at(file, error.span().start().line)))?;
        self.items(&syntax.items, file, below, path, root)
    }

    fn items(
        &mut self,
        items: &[Item],
        file: &Path,
        below: &Path,
        path: Vec<String>,
        root: Vec<String>,
    ) -> Result<()> {
        let is_module = |item: &Item| match item {
            Item::Mod(module) if !is_for_tests(&module.attrs) => Some(module.clone()),
            _ => None,
        };
        let children: Vec<ItemMod> = items.iter().filter_map(is_module).collect();
        let mut found = Paths::new(self.extern_name.clone());
        for item in items.iter().filter(|item| !matches!(item, Item::Mod(_))) {
            found.visit_item(item);
        }
        self.modules.push(Module {
            path: path.clone(),
            root: root.clone(),
            file: file.to_path_buf(),
            children: children.iter().map(|module| module.ident.to_string()).collect(),
            imports: found.imports,
            written: found.written,
        });
        for child in children {
            let name = child.ident.to_string();
            let mut path = path.clone();
            path.push(name.clone());
            let inside = below.join(&name);
            match &child.content {
                Some((_, items)) => self.items(items, file, &inside, path, root.clone())?,
                None => {
                    let file = self.file_of(&child, file, below)?;
                    self.file(&file, &inside, path, root.clone())?;
                }
            }
        }
        Ok(())
    }

    fn file_of(&self, module: &ItemMod, parent: &Path, below: &Path) -> Result<PathBuf> {
        let name = module.ident.to_string();
        let candidates = match path_attribute(&module.attrs) {
            Some(path) => vec![parent.with_file_name(path)],
            None => vec![below.join(format!("{name}.rs")), below.join(&name).join("mod.rs")],
        };
        candidates.into_iter().find(|file| self.root.join(file).is_file()).with_context(|| {
            let line = module.ident.span().start().line;
            format!("{}: module {name} has no file", at(parent, line))
        })
    }
}

/// `FILE:LINE`, which terminals turn into a link.
pub(super) fn at(file: &Path, line: usize) -> String {
    format!("{}:{line}", file.display())
}

fn path_attribute(attributes: &[Attribute]) -> Option<String> {
    attributes.iter().find_map(|attribute| match &attribute.meta {
        Meta::NameValue(value) if value.path.is_ident("path") => match &value.value {
            syn::Expr::Lit(syn::ExprLit { lit: syn::Lit::Str(path), .. }) => Some(path.value()),
            _ => None,
        },
        _ => None,
    })
}

#[cfg(test)]
mod tests;
