//! The bill of materials, as CycloneDX has it (ECMA-424).

use anyhow::Result;
use serde_json::{Value, json};

use super::contents::{Component, Origin};

/// The document, without a time and without a serial number: the same image has the same one.
pub(super) fn document(version: &str, components: &[Component]) -> Result<Vec<u8>> {
    let document = json!({
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "component": {
                "type": "container",
                "bom-ref": "image",
                "name": super::NAME,
                "version": version,
            },
        },
        "components": components.iter().map(component).collect::<Vec<_>>(),
    });
    Ok(serde_json::to_vec_pretty(&document)?)
}

fn component(component: &Component) -> Value {
    let url = url(component);
    let mut value = json!({
        "type": "library",
        "bom-ref": url,
        "name": component.name,
        "version": component.version,
        "purl": url,
    });
    if let Some(licence) = licence(component) {
        value["licenses"] = json!([{ "expression": licence }]);
    }
    value
}

/// The licence as an SPDX expression. Debian's packages have files instead, which are in the
/// image.
pub(super) fn licence(component: &Component) -> Option<String> {
    match &component.origin {
        // "MIT/Apache-2.0" is how crates wrote it before SPDX expressions.
        Origin::Crate { licence, .. } => Some(licence.replace('/', " OR ")),
        Origin::Rust => Some("MIT OR Apache-2.0".to_owned()),
        Origin::Debian { .. } => None,
    }
}

/// The package URL: what a scanner looks a component up by.
fn url(component: &Component) -> String {
    let Component { name, version, .. } = component;
    let version = version.replace('+', "%2B").replace(':', "%3A").replace('~', "%7E");
    match &component.origin {
        Origin::Crate { .. } => format!("pkg:cargo/{name}@{version}"),
        Origin::Rust => format!("pkg:generic/rust-std@{version}"),
        Origin::Debian { architecture } => {
            format!("pkg:deb/debian/{name}@{version}?arch={architecture}")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(name: &str, version: &str, origin: Origin) -> Component {
        let (name, version) = (name.to_owned(), version.to_owned());
        Component { name, version, origin, licences: "/".into() }
    }

    #[test]
    fn components_have_package_urls_and_licences() {
        let crate_of = |licence: &str| Origin::Crate { licence: licence.to_owned(), own: false };
        let debian = Origin::Debian { architecture: "amd64".to_owned() };
        let components = [
            of("old", "1.0.0+b", crate_of("MIT/Apache-2.0")),
            of("libc6", "2.36-9+deb12u10", debian),
        ];
        let document = document("0.1.0", &components).expect("a document");
        let document: Value = serde_json::from_slice(&document).expect("JSON");
        let [old, libc] = [0, 1].map(|at| document["components"][at].clone());
        assert_eq!(old["purl"], "pkg:cargo/old@1.0.0%2Bb");
        assert_eq!(old["licenses"][0]["expression"], "MIT OR Apache-2.0");
        assert_eq!(libc["purl"], "pkg:deb/debian/libc6@2.36-9%2Bdeb12u10?arch=amd64");
        assert_eq!(libc["licenses"], Value::Null);
    }
}
