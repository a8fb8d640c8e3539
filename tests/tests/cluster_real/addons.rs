//! What tests install as an administrator would: objects beside those of the test's namespace.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use lb_tests::harness::real::objects::list;
use serde_json::{Value, json};

use crate::world::World;

impl World {
    /// Creates objects that belong to no namespace, and removes them after the test.
    pub(crate) fn with_cluster_objects(
        &self,
        objects: &[Value],
        test: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let objects = list(objects);
        self.real.kubectl().apply(&objects)?;
        let outcome = test();
        let delete = ["delete", "--wait=true", "--timeout=60s", "-f", "-"];
        let deleted = self.real.kubectl().run_with(&delete, &objects);
        outcome?;
        deleted.map(drop)
    }

    /// Rights in the whole cluster for a service account of the test's namespace.
    pub(crate) fn role(&self, account: &str, rules: &Value) -> [Value; 2] {
        const GROUP: &str = "rbac.authorization.k8s.io";
        let version = format!("{GROUP}/v1");
        [
            json!({
                "apiVersion": version,
                "kind": "ClusterRole",
                "metadata": {"name": account},
                "rules": rules,
            }),
            json!({
                "apiVersion": version,
                "kind": "ClusterRoleBinding",
                "metadata": {"name": account},
                "roleRef": {"apiGroup": GROUP, "kind": "ClusterRole", "name": account},
                "subjects": [{
                    "kind": "ServiceAccount",
                    "name": account,
                    "namespace": self.namespace(),
                }],
            }),
        ]
    }

    /// Runs a program of the client outside and returns what it prints.
    pub(crate) fn run_outside(&self, program: &str, arguments: &[&str]) -> Result<String> {
        let output = self.real.outside().run(|| {
            let mut command = Command::new(program);
            command.args(arguments).output().with_context(|| format!("cannot start {program}"))
        })?;
        ensure!(
            output.status.success(),
            "`{program} {}`: {}: {}",
            arguments.join(" "),
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}
