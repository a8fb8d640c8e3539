//! kube-proxy's configuration file.

use lb_agent::kube_proxy::{KubeProxyConfiguration, flags::KubeProxyFlags};

/// Parses a file. An error is one line; a valid configuration survives being written and read.
pub(crate) fn run(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let all = match KubeProxyConfiguration::parse(text) {
        Ok(all) => all,
        Err(error) => {
            let message = error.to_string();
            assert!(!message.trim().is_empty() && !error.message.contains('\n'), "{message:?}");
            return;
        }
    };
    all.without_effect(&KubeProxyFlags::default());
    assert!(all.unknown().iter().all(|field| !field.is_empty()), "{:?}", all.unknown());
    let written = all.to_yaml();
    let again = match KubeProxyConfiguration::parse(&written) {
        Ok(again) => again,
        Err(error) => panic!("what was written cannot be read: {error}\n{written}"),
    };
    assert_eq!(again.unknown(), [""; 0], "written with unknown fields:\n{written}");
    assert_eq!(again.to_yaml(), written);
    assert_eq!(again.to_configz(), all.to_configz());
}
