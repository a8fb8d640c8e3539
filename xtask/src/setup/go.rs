//! Programs built from the Go modules of this repository, each of which names the version of
//! what it is made for.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use super::cached;
use crate::progress::Progress;
use crate::run;
use crate::workspace::{Workspace, on_path};

/// A Go module of this repository, and the programs that it builds.
pub(super) struct Module {
    /// Its directory in the repository.
    pub(super) source: &'static str,
    /// The module that it is made for, whose version names the directory in the cache.
    pub(super) made_for: &'static str,
    /// What the name of that directory begins with.
    pub(super) name: &'static str,
    pub(super) programs: &'static [Program],
    /// How long the first build takes on two cores.
    pub(super) takes: &'static str,
}

/// A program, and the Go package that it is built from.
pub(super) struct Program {
    /// Its file; the last part of the package's name, if its module has other programs.
    pub(super) name: &'static str,
    pub(super) package: &'static str,
    pub(super) kind: Kind,
}

/// How Go builds a program.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    /// `go build`
    Main,
    /// The same with C, of which nothing is linked at run time.
    WithC,
    /// `go test -c`: the tests of the package.
    Tests,
}

impl Program {
    pub(super) const fn new(name: &'static str, package: &'static str) -> Self {
        Self { name, package, kind: Kind::Main }
    }
}

impl Module {
    /// Builds the programs that the cache lacks; returns whether any was missing.
    pub(super) fn ensure(&self, workspace: &Workspace) -> Result<bool> {
        self.ensure_in(workspace, |_| Ok(workspace.root().join(self.source)))
    }

    /// The same, built in the directory that `prepare` makes in a scratch directory.
    pub(super) fn ensure_in(
        &self,
        workspace: &Workspace,
        prepare: impl FnOnce(&Path) -> Result<PathBuf>,
    ) -> Result<bool> {
        let names: Vec<&str> = self.programs.iter().map(|program| program.name).collect();
        cached(workspace, &self.dir(workspace)?, &names, |into, missing| {
            self.build(workspace, &prepare(into)?, into, missing)
        })
    }

    /// Where the programs are.
    pub(super) fn dir(&self, workspace: &Workspace) -> Result<PathBuf> {
        let version = self.version(workspace)?;
        Ok(workspace.cache().join(format!("{}-{version}", self.name)))
    }

    /// The version of what the module is made for.
    pub(super) fn version(&self, workspace: &Workspace) -> Result<String> {
        self.version_of(workspace, self.made_for)
    }

    /// The version of a module that it requires.
    pub(super) fn version_of(&self, workspace: &Workspace, module: &str) -> Result<String> {
        let go_mod = workspace.root().join(self.source).join("go.mod");
        let text = fs::read_to_string(&go_mod).with_context(|| {
            format!("cannot read {}, which names the version of {module}", go_mod.display())
        })?;
        let version = required_version(&text, module)
            .with_context(|| format!("{} does not require {module}", go_mod.display()))?;
        Ok(version.to_owned())
    }

    fn build(
        &self,
        workspace: &Workspace,
        source: &Path,
        into: &Path,
        missing: &[&str],
    ) -> Result<()> {
        let version = self.version(workspace)?;
        let what = format!("{} of {} {version}", missing.join(", "), self.made_for);
        ensure!(
            on_path("go").is_some(),
            "{what} must be built with Go, and PATH has no `go`: install it \
             (https://go.dev/doc/install)"
        );
        let takes = self.takes;
        let progress = Progress::start(format!("building {what}, about {takes} the first time"));
        let mut wanted: Vec<&Program> =
            self.programs.iter().filter(|program| missing.contains(&program.name)).collect();
        wanted.sort_by_key(|program| program.kind);
        for alike in wanted.chunk_by(|one, other| one.kind == other.kind) {
            self.build_alike(workspace, source, into, alike)?;
        }
        progress.done();
        Ok(())
    }

    /// Builds programs of one kind: main packages by one call, which links some while it compiles
    /// others.
    fn build_alike(
        &self,
        workspace: &Workspace,
        source: &Path,
        into: &Path,
        programs: &[&Program],
    ) -> Result<()> {
        let Some(kind) = programs.first().map(|program| program.kind) else { return Ok(()) };
        let names: Vec<&str> = programs.iter().map(|program| program.name).collect();
        let log = workspace.log(&format!("go-{}", names.join("-")));
        let mut build = workspace.command("go");
        build.current_dir(source);
        build.env("CGO_ENABLED", if kind == Kind::WithC { "1" } else { "0" });
        let (arguments, linker): (&[&str], _) = match kind {
            Kind::Main => (&["build"], "-s -w"),
            Kind::WithC => (
                &["build", "-tags", "netgo,osusergo"],
                "-s -w -linkmode external -extldflags -static",
            ),
            Kind::Tests => (&["test", "-c", "-vet=off"], "-s -w"),
        };
        build.args(arguments).args(["-trimpath", "-ldflags", linker, "-o"]);
        // Into a directory, Go writes each program by the last part of its package's name.
        match programs {
            [program] => build.arg(into.join(program.name)),
            _ => build.arg(into),
        };
        build.args(programs.iter().map(|program| program.package));
        run::logged(&mut build, &log)
            .with_context(|| format!("{} could not be built", names.join(", ")))
    }
}

/// The version that a go.mod requires of a module, in a block or alone.
fn required_version<'a>(go_mod: &'a str, module: &str) -> Option<&'a str> {
    go_mod.lines().find_map(|line| {
        let mut words = line.split_whitespace().skip_while(|word| *word == "require");
        let name = words.next()?;
        words.next().filter(|version| name == module && version.starts_with('v'))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_read_from_the_require_line() {
        let rows = [
            ("require k8s.io/kubernetes v1.36.3\n", Some("v1.36.3")),
            (
                "require (\n\tk8s.io/api v0.36.3\n\tk8s.io/kubernetes v1.36.3 // indirect\n)\n",
                Some("v1.36.3"),
            ),
            ("replace (\n\tk8s.io/kubernetes => ../kubernetes\n)\n", None),
            ("tool k8s.io/kubernetes/cmd/kube-apiserver\n", None),
            ("// k8s.io/kubernetes\n", None),
        ];
        for (text, expected) in rows {
            assert_eq!(required_version(text, "k8s.io/kubernetes"), expected, "{text}");
        }
    }
}
