//! Certificate authorities of clients, and the certificates that they sign, made by openssl.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// An authority, with files of its own in a directory.
pub(super) struct Authority {
    directory: PathBuf,
}

/// A client's certificate and key, as text.
pub(super) struct Pair {
    certificate: String,
    key: String,
}

impl Pair {
    /// Writes both, each at once, as programs do that rotate certificates.
    pub(super) fn put(&self, certificate: &Path, key: &Path) -> Result<()> {
        for (path, text) in [(certificate, &self.certificate), (key, &self.key)] {
            let unfinished = path.with_extension("new");
            fs::write(&unfinished, text)?;
            fs::rename(&unfinished, path)?;
        }
        Ok(())
    }
}

impl Authority {
    pub(super) fn make(below: &Path, name: &str) -> Result<Self> {
        let directory = below.join(name);
        fs::create_dir(&directory)?;
        let authority = Self { directory };
        let subject = format!("/CN=authority {name}");
        let new = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"];
        authority
            .openssl(&[&new[..], &["-subj", &subject, "-keyout", "ca.key"]].concat(), "ca.crt")?;
        Ok(authority)
    }

    /// The authority's own certificate.
    pub(super) fn certificate(&self) -> Result<String> {
        self.read("ca.crt")
    }

    /// A certificate of a user of the API server.
    pub(super) fn sign(&self, user: &str) -> Result<Pair> {
        let subject = format!("/CN={user}");
        let new = ["req", "-newkey", "rsa:2048", "-nodes", "-subj", &subject];
        self.openssl(&[&new[..], &["-keyout", "client.key"]].concat(), "client.csr")?;
        fs::write(self.directory.join("use"), "extendedKeyUsage=clientAuth\n")?;
        let sign = ["x509", "-req", "-in", "client.csr", "-CA", "ca.crt", "-CAkey", "ca.key"];
        let limits = ["-CAcreateserial", "-days", "1", "-extfile", "use"];
        self.openssl(&[&sign[..], &limits].concat(), "client.crt")?;
        Ok(Pair { certificate: self.read("client.crt")?, key: self.read("client.key")? })
    }

    fn openssl(&self, arguments: &[&str], out: &str) -> Result<()> {
        let mut command = Command::new("openssl");
        command.current_dir(&self.directory).args(arguments).args(["-out", out]);
        let output = command.output().context("cannot start openssl")?;
        let error = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{command:?}: {error}");
        Ok(())
    }

    fn read(&self, name: &str) -> Result<String> {
        let path = self.directory.join(name);
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
    }
}
