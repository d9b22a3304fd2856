//! Data volumes for operators: a folder comes onto the engine, what is there is listed and taken away, and whether templates find what they name. What a volume is
//! made of is the engine's business.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{StartError, connect_guard, engine_error, engine_settings, first_image};
use crate::config::Config;
use crate::domain::data;
use crate::engine::docker::DockerEngine;
use crate::engine::pack::{self, PackError, Packed};
use crate::engine::{DataVolume, Engine, EngineError};
use crate::task;

/// Why nothing was done with data.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// The name can't be one.
    #[error("{0}")]
    Name(String),
    /// The folder can't be packed.
    #[error("can't import {}: {source}", folder.display())]
    Folder {
        /// The folder.
        folder: PathBuf,
        /// What of it, and why.
        source: PackError,
    },
    /// The engine has no image.
    #[error(
        "the engine has none of the templates' images, and data goes through a container of one: pull or build it first"
    )]
    NoImage,
    /// The engine refuses or fails.
    #[error(transparent)]
    Start(#[from] StartError),
}

/// What an import has come to.
#[derive(Debug)]
pub struct Imported {
    /// What was read.
    pub packed: Packed,
    /// What is on the engine.
    pub volume: DataVolume,
}

/// Puts a folder's content onto the engine under a name.
///
/// # Errors
/// See [`DataError`]. Nothing has changed then.
pub async fn import(config: &Config, folder: &Path, name: &str) -> Result<Imported, DataError> {
    data::check_name(name).map_err(DataError::Name)?;
    let engine = connect(config).await?;
    let image = first_image(engine.as_ref(), config).await.ok_or(DataError::NoImage)?;
    let (to, archive) = pack::pipe();
    let from = folder.to_owned();
    let packing = task::blocking(move || pack::pack(&from, to));
    let (packed, imported) = tokio::join!(packing, engine.import_data(name, &image, archive));
    match (packed, imported) {
        (Some(Ok(packed)), Ok(volume)) => Ok(Imported { packed, volume }),
        // Whatever the engine says of an archive that broke off, this is why.
        (Some(Err(source)), _) if !source.is_unwanted => Err(DataError::Folder { folder: folder.to_owned(), source }),
        (_, Err(error)) => Err(engine_error(config, error).into()),
        (_, Ok(_)) => {
            let detail = "the folder was not packed to its end".to_owned();
            Err(engine_error(config, EngineError::Unexpected { attempt: "importing data", detail }).into())
        }
    }
}

/// All data on the engine, by name.
///
/// # Errors
/// The engine can't be used.
pub async fn list(config: &Config) -> Result<Vec<DataVolume>, DataError> {
    Ok(connect(config).await?.list_data().await.map_err(|e| engine_error(config, e))?)
}

/// Takes the data of a name away. Says which templates name it.
///
/// # Errors
/// The engine can't be used, or has none of that name.
pub async fn remove(config: &Config, name: &str) -> Result<Vec<String>, DataError> {
    data::check_name(name).map_err(DataError::Name)?;
    connect(config).await?.remove_data(name).await.map_err(|e| engine_error(config, e))?;
    let names = |(_, mount): &(&str, &str)| *mount == name;
    Ok(mounts(config).filter(names).map(|(template, _)| template.to_owned()).collect())
}

/// Whether the engine has all the data that templates name. Without any, it is not asked.
///
/// # Errors
/// [`StartError::NoData`] with what is missing, or the engine can't be used.
pub async fn check(config: &Config) -> Result<(), StartError> {
    if mounts(config).next().is_none() {
        return Ok(());
    }
    require(connect(config).await?.as_ref(), config).await
}

/// The same for an engine that is there.
pub(super) async fn require(engine: &dyn Engine, config: &Config) -> Result<(), StartError> {
    if mounts(config).next().is_none() {
        return Ok(());
    }
    let there = engine.list_data().await.map_err(|e| engine_error(config, e))?;
    let is_missing = |(_, name): &(&str, &str)| !there.iter().any(|volume| volume.name == *name);
    let missing: Vec<_> = mounts(config).filter(is_missing).map(|(t, name)| (t.to_owned(), name.to_owned())).collect();
    if missing.is_empty() { Ok(()) } else { Err(StartError::NoData { missing }) }
}

/// Each template with each name of its data.
fn mounts(config: &Config) -> impl Iterator<Item = (&str, &str)> {
    config
        .templates
        .values()
        .flat_map(|template| template.data.iter().map(move |mount| (template.name.as_str(), mount.name.as_str())))
}

/// The engine, for which no guest is needed here.
async fn connect(config: &Config) -> Result<Arc<dyn Engine>, StartError> {
    if let Some(socket) = config.engine.guard() {
        return Ok(Arc::new(connect_guard(&socket, config).await?));
    }
    let engine = DockerEngine::connect(engine_settings(config, Vec::new())).await;
    Ok(Arc::new(engine.map_err(|e| engine_error(config, e))?))
}
