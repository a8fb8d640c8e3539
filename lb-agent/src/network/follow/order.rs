//! The order of lb's programs and those of others on the hooks of the interfaces.

use tracing::warn;

use super::Interfaces;

impl Interfaces {
    /// Finds programs of others that are on the wrong side of lb's, and publishes them.
    pub(super) fn find_misplaced(&self) {
        let mut misplaced = Vec::new();
        for point @ (index, direction) in self.attached.keys() {
            let Ok(found) = self.attacher.misplaced(*point) else { continue };
            let name = self.network.links.get(index).map_or("", |link| &link.name);
            misplaced.extend(
                found.iter().map(|program| format!("{program} at {} of {name}", direction.name())),
            );
        }
        self.published.send_if_modified(|published| {
            let is_changed = published.misplaced != misplaced;
            if is_changed && !misplaced.is_empty() {
                warn!(
                    ?misplaced,
                    "programs of others see packets of Services with the addresses of backends: \
                     NetworkPolicies there may drop them; see docs/neighbours.md"
                );
            }
            published.misplaced.clone_from(&misplaced);
            is_changed
        });
    }
}
