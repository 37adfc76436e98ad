//! What `docker save` and `podman save` write: a tar with a `manifest.json` that lists, for each image, the file with
//! its configuration, its tags, and its layers in order. The configuration has the digests of the unpacked layers.

use serde::Deserialize;

use super::blobs::Blobs;
use super::oci::{self, Chosen, Layer};
use super::stream::digest;
use super::{Error, Result};

/// One image of `manifest.json`.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Image {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

impl Image {
    fn tags(&self) -> &[String] {
        self.repo_tags.as_deref().unwrap_or_default()
    }

    /// The digest of its configuration, which the file is named after.
    fn id(&self) -> String {
        let name = self.config.rsplit('/').next().unwrap_or_default();
        format!("sha256:{}", name.trim_end_matches(".json"))
    }
}

fn images(blobs: &Blobs) -> Result<Vec<Image>> {
    serde_json::from_slice(&blobs.document("manifest.json")?)
        .map_err(|error| blobs.wrong(format!("its manifest.json cannot be understood ({error})")))
}

fn names(images: &[Image]) -> Vec<String> {
    let name = |image: &Image| match image.tags() {
        [] => vec![image.id()],
        tags => tags.to_vec(),
    };
    images.iter().flat_map(name).collect()
}

/// All names in an archive, and the digests of images that have none.
///
/// # Errors
/// When they cannot be read.
pub(super) fn tags(blobs: &Blobs) -> Result<Vec<String>> {
    Ok(names(&images(blobs)?))
}

/// Chooses the image called `reference` (a tag or a digest), or the only one.
///
/// # Errors
/// When there is none for this kind of machine, more than one, or it is not whole.
pub(super) fn choose(blobs: &Blobs, reference: Option<&str>) -> Result<Chosen> {
    let images = images(blobs)?;
    let called = |image: &&Image, wanted: &str| {
        image.id() == wanted || image.tags().iter().any(|tag| oci::names(tag, wanted))
    };
    let found: Vec<&Image> = match reference {
        None => images.iter().collect(),
        Some(wanted) => images
            .iter()
            .filter(|image| called(image, wanted))
            .collect(),
    };
    let image = match (&found[..], reference) {
        ([image], _) => image,
        ([], Some(wanted)) => {
            return Err(Error::NoSuchTag {
                path: blobs.path().to_owned(),
                wanted: wanted.to_owned(),
                available: names(&images),
            });
        }
        ([], None) => return Err(blobs.wrong("its manifest.json lists no image")),
        _ => {
            return Err(Error::Ambiguous {
                path: blobs.path().to_owned(),
                available: names(&images),
            });
        }
    };
    let bytes = blobs.document(&image.config)?;
    let id = digest(&bytes);
    // Not all programs name the file after what is in it.
    if image.id().len() == id.len() {
        blobs.check("its configuration", &image.id(), &id)?;
    }
    let configuration = oci::configuration(blobs, &bytes)?;
    let diff_ids = configuration.rootfs().diff_ids();
    if image.layers.len() != diff_ids.len() {
        return Err(blobs.wrong(format!(
            "it has {} layers but its configuration speaks of {}",
            image.layers.len(),
            diff_ids.len()
        )));
    }
    oci::check_count(blobs, diff_ids.len())?;
    let mut layers = Vec::new();
    for (name, diff_id) in image.layers.iter().zip(diff_ids) {
        layers.push(Layer {
            blob: blobs.open(name)?,
            digest: None,
            diff_id: Some(diff_id.clone()),
        });
    }
    Ok(Chosen {
        digest: id,
        tags: image.tags().to_vec(),
        configuration,
        layers,
    })
}
