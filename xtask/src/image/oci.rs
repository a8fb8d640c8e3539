//! An image as one tar archive that is an OCI image layout (`index.json`, `oci-layout`, `blobs/`),
//! which `ctr images import` takes, and a docker archive (`manifest.json`), which `docker load`
//! takes. It is the same bytes whenever it is made from the same content.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use oci_spec::image::{
    ANNOTATION_REF_NAME, Arch, Config, ConfigBuilder, Descriptor, DescriptorBuilder,
    ImageConfigurationBuilder, ImageIndexBuilder, ImageManifestBuilder, MediaType, Os,
    PlatformBuilder, RootFsBuilder, SCHEMA_VERSION, Sha256Digest,
};
use serde::Serialize;
use sha2::{Digest, Sha256};

use super::layer::{Layer, gzip};
use crate::architecture::Architecture;

/// The annotation from which containerd takes an image's name.
const CONTAINERD_NAME: &str = "io.containerd.image.name";
/// The version of the layout, in `oci-layout`.
const LAYOUT: &[u8] = br#"{"imageLayoutVersion":"1.0.0"}"#;

/// An image that is being put together.
pub(crate) struct Image {
    names: Vec<String>,
    architecture: Architecture,
    created: Option<String>,
    config: Config,
    annotations: BTreeMap<String, String>,
    layers: Vec<Blob>,
}

/// A layer as it is in the image, and the digest of its archive before compression.
struct Blob {
    bytes: Vec<u8>,
    media_type: MediaType,
    diff_id: String,
}

/// What is run in a container of the image.
#[derive(Default)]
pub(crate) struct Process {
    /// The program and its first arguments.
    pub(crate) entrypoint: Vec<String>,
    /// Arguments that a container may replace.
    pub(crate) arguments: Vec<String>,
    /// `NAME=VALUE`.
    pub(crate) environment: Vec<String>,
    /// `UID:GID`; root if it is empty.
    pub(crate) user: String,
}

/// An entry of `manifest.json`.
#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct DockerImage {
    config: String,
    repo_tags: Vec<String>,
    layers: Vec<String>,
}

impl Image {
    /// Begins an image. A name is complete: `registry/path:tag`.
    pub(crate) fn new(
        names: &[&str],
        architecture: Architecture,
        process: Process,
    ) -> Result<Self> {
        ensure!(!names.is_empty(), "an image needs a name");
        for name in names {
            let tag = name.rsplit('/').next().and_then(|last| last.split_once(':'));
            ensure!(tag.is_some(), "{name} has no tag: write it as {name}:TAG");
        }
        let config = ConfigBuilder::default()
            .entrypoint(process.entrypoint)
            .cmd(process.arguments)
            .env(process.environment)
            .user(process.user)
            .working_dir("/")
            .build()?;
        Ok(Self {
            names: names.iter().map(|name| (*name).to_owned()).collect(),
            architecture,
            created: None,
            config,
            annotations: BTreeMap::new(),
            layers: Vec::new(),
        })
    }

    /// Says when the image was made, as RFC 3339 has it.
    pub(crate) fn created(&mut self, time: &str) {
        self.created = Some(time.to_owned());
    }

    /// Adds a label, which is an annotation of the manifest too.
    pub(crate) fn label(&mut self, key: &str, value: &str) {
        self.annotations.insert(key.to_owned(), value.to_owned());
    }

    /// Adds a compressed layer.
    pub(crate) fn layer(&mut self, layer: &Layer) -> Result<()> {
        let archive = layer.archive()?;
        let bytes = gzip(&archive)?;
        self.layers.push(Blob {
            bytes,
            media_type: MediaType::ImageLayerGzip,
            diff_id: format!("sha256:{}", sha256(&archive)),
        });
        Ok(())
    }

    /// Adds a layer as it is, for an image that stays on this machine.
    pub(crate) fn uncompressed_layer(&mut self, layer: &Layer) -> Result<()> {
        let bytes = layer.archive()?;
        let diff_id = format!("sha256:{}", sha256(&bytes));
        self.layers.push(Blob { bytes, media_type: MediaType::ImageLayer, diff_id });
        Ok(())
    }

    /// Writes the archive.
    pub(crate) fn write(&self, path: &Path) -> Result<()> {
        let bytes = self.archive()?;
        let shown = || format!("cannot write {}", path.display());
        path.parent().map_or(Ok(()), fs::create_dir_all).with_context(shown)?;
        fs::write(path, bytes).with_context(shown)
    }

    /// The archive.
    pub(super) fn archive(&self) -> Result<Vec<u8>> {
        let mut archive = Layer::default();
        archive.bytes("oci-layout", LAYOUT, 0o644);
        let mut blob = |bytes: Vec<u8>, media_type: MediaType| -> Result<Descriptor> {
            let digest = sha256(&bytes);
            let descriptor = Descriptor::new(media_type, bytes.len() as u64, digest.clone());
            archive.bytes(&format!("blobs/sha256/{}", digest.digest()), bytes, 0o644);
            Ok(descriptor)
        };
        let config = blob(self.configuration()?, MediaType::ImageConfig)?;
        let layers = self
            .layers
            .iter()
            .map(|layer| blob(layer.bytes.clone(), layer.media_type.clone()))
            .collect::<Result<Vec<_>>>()?;
        let manifest = ImageManifestBuilder::default()
            .schema_version(SCHEMA_VERSION)
            .media_type(MediaType::ImageManifest)
            .config(config.clone())
            .layers(layers.clone())
            .annotations(self.annotations.clone().into_iter().collect::<HashMap<_, _>>())
            .build()?;
        let manifest = blob(json(&manifest)?, MediaType::ImageManifest)?;
        archive.bytes("index.json", self.index(&manifest)?, 0o644);
        archive.bytes("manifest.json", self.docker(&config, &layers)?, 0o644);
        archive.archive()
    }

    fn configuration(&self) -> Result<Vec<u8>> {
        let mut config = self.config.clone();
        config.set_labels(Some(self.annotations.clone().into_iter().collect()));
        let diff_ids: Vec<_> = self.layers.iter().map(|layer| layer.diff_id.clone()).collect();
        let mut configuration = ImageConfigurationBuilder::default()
            .architecture(Arch::from(self.architecture.name()))
            .os(Os::Linux)
            .config(config)
            .rootfs(RootFsBuilder::default().typ("layers").diff_ids(diff_ids).build()?)
            .build()?;
        configuration.set_created(self.created.clone());
        configuration.set_variant(self.architecture.variant().map(str::to_owned));
        json(&configuration)
    }

    /// The index has the manifest once for each name.
    fn index(&self, manifest: &Descriptor) -> Result<Vec<u8>> {
        let mut platform = PlatformBuilder::default()
            .architecture(Arch::from(self.architecture.name()))
            .os(Os::Linux)
            .build()?;
        platform.set_variant(self.architecture.variant().map(str::to_owned));
        let named = |name: &String| {
            let tag = name.rsplit(':').next().unwrap_or_default();
            let annotations = [(CONTAINERD_NAME, name.as_str()), (ANNOTATION_REF_NAME, tag)];
            DescriptorBuilder::default()
                .media_type(manifest.media_type().clone())
                .digest(manifest.digest().clone())
                .size(manifest.size())
                .platform(platform.clone())
                .annotations(
                    annotations
                        .map(|(key, value)| (key.to_owned(), value.to_owned()))
                        .into_iter()
                        .collect::<HashMap<_, _>>(),
                )
                .build()
        };
        let manifests = self.names.iter().map(named).collect::<Result<Vec<_>, _>>()?;
        let index = ImageIndexBuilder::default()
            .schema_version(SCHEMA_VERSION)
            .media_type(MediaType::ImageIndex)
            .manifests(manifests)
            .build()?;
        json(&index)
    }

    fn docker(&self, config: &Descriptor, layers: &[Descriptor]) -> Result<Vec<u8>> {
        let path = |blob: &Descriptor| format!("blobs/sha256/{}", blob.digest().digest());
        json(&[DockerImage {
            config: path(config),
            repo_tags: self.names.clone(),
            layers: layers.iter().map(path).collect(),
        }])
    }
}

/// JSON whose keys are sorted: the maps of oci-spec have another order in each run.
fn json(value: &impl Serialize) -> Result<Vec<u8>> {
    let mut value = serde_json::to_value(value)?;
    value.sort_all_objects();
    Ok(serde_json::to_vec(&value)?)
}

/// The digest of these bytes.
pub(super) fn sha256(bytes: &[u8]) -> Sha256Digest {
    let hex: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    hex.parse().expect("the digest of SHA-256 has 64 digits")
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use serde_json::Value;

    use super::*;

    /// An image with two names and two layers; every call makes it anew.
    fn image() -> Image {
        image_for(Architecture::Amd64)
    }

    fn image_for(architecture: Architecture) -> Image {
        let process = Process {
            entrypoint: vec!["/bin/a".to_owned()],
            arguments: vec!["run".to_owned()],
            environment: vec!["A=1".to_owned()],
            user: "0:0".to_owned(),
        };
        let names = ["localhost/a:1", "localhost/b:2"];
        let mut image = Image::new(&names, architecture, process).expect("an image");
        image.created("2026-01-01T00:00:00Z");
        for key in ["c", "a", "b", "e", "d"] {
            image.label(key, "value");
        }
        for path in ["/bin/a", "/bin/b"] {
            let mut layer = Layer::default();
            layer.bytes(path, path.as_bytes(), 0o755);
            image.layer(&layer).expect("a layer");
        }
        image
    }

    fn files(archive: &[u8]) -> BTreeMap<String, Vec<u8>> {
        let mut archive = tar::Archive::new(archive);
        let read = archive.entries().expect("an archive").map(|entry| {
            let mut entry = entry.expect("an entry");
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes).expect("bytes");
            (entry.path().expect("a path").to_string_lossy().into_owned(), bytes)
        });
        read.collect()
    }

    fn parse(bytes: &[u8]) -> Value {
        serde_json::from_slice(bytes).expect("JSON")
    }

    #[test]
    fn the_same_content_is_the_same_bytes() {
        let first = image().archive().expect("an archive");
        assert!((0..8).all(|_| image().archive().expect("an archive") == first));
    }

    #[test]
    fn every_blob_has_its_digest_for_a_name_and_is_reached_from_the_index_by_both_names() {
        let files = files(&image().archive().expect("an archive"));
        for (path, bytes) in &files {
            if let Some(digest) = path.strip_prefix("blobs/sha256/").filter(|rest| !rest.is_empty())
            {
                assert_eq!(digest, sha256(bytes).digest());
            }
        }
        let blob = |descriptor: &Value| {
            let digest = descriptor["digest"].as_str().expect("a digest").replace(':', "/");
            let bytes = files.get(&format!("blobs/{digest}")).expect("a blob");
            assert_eq!(descriptor["size"], bytes.len());
            bytes.as_slice()
        };
        let index = parse(&files["index.json"]);
        let manifests = index["manifests"].as_array().expect("manifests");
        let name = |manifest: &Value| manifest["annotations"][CONTAINERD_NAME].clone();
        assert_eq!(
            manifests.iter().map(name).collect::<Vec<_>>(),
            ["localhost/a:1", "localhost/b:2"]
        );
        let manifest = parse(blob(&manifests[0]));
        let config = parse(blob(&manifest["config"]));
        assert_eq!(config["config"]["Entrypoint"][0], "/bin/a");
        assert_eq!(config["config"]["Labels"]["c"], "value");
        let layers = manifest["layers"].as_array().expect("layers");
        let diff_ids = config["rootfs"]["diff_ids"].as_array().expect("diff_ids");
        assert_eq!((layers.len(), diff_ids.len()), (2, 2));
        for (layer, diff_id) in layers.iter().zip(diff_ids) {
            let mut archive = Vec::new();
            flate2::read::GzDecoder::new(blob(layer)).read_to_end(&mut archive).expect("gzip");
            assert_eq!(format!("sha256:{}", sha256(&archive)), *diff_id);
        }
    }

    #[test]
    fn docker_finds_the_same_configuration_and_layers() {
        let files = files(&image().archive().expect("an archive"));
        let docker = parse(&files["manifest.json"]);
        let entry = &docker[0];
        assert_eq!(entry["RepoTags"], serde_json::json!(["localhost/a:1", "localhost/b:2"]));
        let config = parse(&files[entry["Config"].as_str().expect("a path")]);
        assert_eq!(config["architecture"], "amd64");
        let layers = entry["Layers"].as_array().expect("layers");
        assert!(layers.iter().all(|layer| files.contains_key(layer.as_str().expect("a path"))));
    }

    #[test]
    fn the_index_and_the_configuration_name_the_architecture_and_its_variant() {
        for (architecture, variant) in
            [(Architecture::Amd64, Value::Null), (Architecture::Arm64, Value::from("v8"))]
        {
            let files = files(&image_for(architecture).archive().expect("an archive"));
            let index = parse(&files["index.json"]);
            let docker = parse(&files["manifest.json"]);
            let config = parse(&files[docker[0]["Config"].as_str().expect("a path")]);
            for platform in [&index["manifests"][0]["platform"], &config] {
                assert_eq!(platform["architecture"], architecture.name());
                assert_eq!(platform["variant"], variant);
            }
        }
    }

    #[test]
    fn a_name_needs_a_tag() {
        let error = Image::new(&["localhost:5000/a"], Architecture::Amd64, Process::default());
        let text = error.map_or_else(|error| error.to_string(), |_| "no error".to_owned());
        assert_eq!(text, "localhost:5000/a has no tag: write it as localhost:5000/a:TAG");
    }
}
