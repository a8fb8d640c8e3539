//! Completions of shells and man pages, made from the command line as it is.

use std::{fs, io, path::Path};

use clap::CommandFactory as _;
use clap_complete::Shell;

use crate::cli::Cli;

const NAME: &str = "lb-agent";

/// The completions of a shell.
pub fn completions(shell: Shell) -> Vec<u8> {
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), NAME, &mut text);
    text
}

/// Writes the man pages of lb-agent and of each command, and the completions of every shell, to
/// where they belong below a prefix such as `/usr/share`.
///
/// # Errors
/// If a file cannot be written.
pub fn write(prefix: &Path) -> io::Result<()> {
    let pages = prefix.join("man/man1");
    fs::create_dir_all(&pages)?;
    clap_mangen::generate_to(Cli::command(), &pages)?;
    for (shell, path) in [
        (Shell::Bash, "bash-completion/completions/lb-agent"),
        (Shell::Fish, "fish/vendor_completions.d/lb-agent.fish"),
        (Shell::Zsh, "zsh/vendor-completions/_lb-agent"),
    ] {
        let path = prefix.join(path);
        path.parent().map_or(Ok(()), fs::create_dir_all)?;
        fs::write(path, completions(shell))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_has_a_page_and_every_shell_its_completions() {
        let prefix = tempfile::tempdir().expect("a directory");
        write(prefix.path()).expect("documents");
        let read = |path: &str| fs::read_to_string(prefix.path().join(path)).expect(path);
        for command in Cli::command().get_subcommands().filter(|command| !command.is_hide_set()) {
            let page = read(&format!("man/man1/lb-agent-{}.1", command.get_name()));
            assert!(page.starts_with(".ie"), "{page}");
        }
        assert!(read("man/man1/lb-agent-status.1").contains("\\-\\-wait"));
        for path in [
            "bash-completion/completions/lb-agent",
            "fish/vendor_completions.d/lb-agent.fish",
            "zsh/vendor-completions/_lb-agent",
        ] {
            assert!(read(path).contains("sysdump"), "{path}");
        }
    }
}
