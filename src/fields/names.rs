//! The reserved names, those that one storage reads in their place, and the check that each name has one meaning.

use std::borrow::Cow;

use super::engine::{Engine, FieldName};
use crate::error::BuildError;

// Read from spans.
pub(crate) const INSTANCE_ID: &str = "workflow.instance_id";
pub(crate) const RUN_ID: &str = "workflow.run_id";
pub(crate) const PARENT_INSTANCE_ID: &str = "workflow.parent_instance_id";
pub(crate) const REPLAYING: &str = "workflow.replaying";
/// As long as `workflow.replaying`, so that no further attribute is looked at because of it (`Meanings::may_have`).
pub(crate) const OBSERVING: &str = "workflow.observing";
pub(crate) const STATUS: &str = "workflow.status";
/// On the first span of an instance: the name of its own span.
pub(crate) const NAME: &str = "workflow.name";
// Written to spans and links.
/// The number of a trace among those of its instance, on the first span of each but the first, and on roots.
pub(crate) const GENERATION: &str = "workflow.generation";
/// On a root: the number of the instance's spans, of the processes that had some, and of the hand-overs between them.
pub(crate) const SPANS: &str = "workflow.spans";
pub(crate) const PROCESSES: &str = "workflow.processes";
pub(crate) const RESUMES: &str = "workflow.resumes";
/// On a start marker: its parent has not been exported.
pub(crate) const PENDING: &str = "workflow.pending";
pub(crate) const RESUMED: &str = "workflow.resumed";
pub(crate) const RELATION: &str = "workflow.relation";
pub(crate) const AGENT_NAME: &str = "agent.name";
/// The name of the agent in the semantic conventions for agents (opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-agent-spans).
pub(crate) const GEN_AI_AGENT_NAME: &str = "gen_ai.agent.name";

// The settings of the builder.
const INSTANCE_ID_FIELDS: &str = "instance_id_fields";
const RUN_ID_FIELDS: &str = "run_id_fields";
const PARENT_INSTANCE_ID_FIELDS: &str = "parent_instance_id_fields";
const STATUS_FIELDS: &str = "status_fields";
const REPLAY_FIELD: &str = "replay_field";
const REPLAY_CHILDREN_FIELD: &str = "replay_children_field";

/// The names that are given in the builder.
#[derive(Clone, Debug)]
pub(crate) struct FieldNames {
    /// The first ranks highest.
    pub(crate) instance_ids: Vec<Cow<'static, str>>,
    pub(crate) run_ids: Vec<Cow<'static, str>>,
    pub(crate) parent_instance_ids: Vec<Cow<'static, str>>,
    pub(crate) statuses: Vec<Cow<'static, str>>,
    pub(crate) replaying: Vec<Cow<'static, str>>,
    pub(crate) replaying_children: Vec<Cow<'static, str>>,
}

impl Default for FieldNames {
    fn default() -> Self {
        Self {
            instance_ids: vec![INSTANCE_ID.into()],
            run_ids: vec![RUN_ID.into()],
            parent_instance_ids: vec![PARENT_INSTANCE_ID.into()],
            statuses: vec![STATUS.into()],
            replaying: vec![REPLAYING.into()],
            replaying_children: Vec::new(),
        }
    }
}

impl FieldNames {
    /// Checks that no name is empty, and that each has one meaning, also beside the names of the engines.
    pub(crate) fn check(&self, engines: &[Engine]) -> Result<(), BuildError> {
        if self.instance_ids.is_empty() {
            return Err(BuildError::NoInstanceIdField);
        }
        // Each name with its owner, which stands for its meaning.
        let mut known = vec![
            (INSTANCE_ID, INSTANCE_ID_FIELDS),
            (RUN_ID, RUN_ID_FIELDS),
            (PARENT_INSTANCE_ID, PARENT_INSTANCE_ID_FIELDS),
            (STATUS, STATUS_FIELDS),
            (REPLAYING, REPLAY_FIELD),
            (OBSERVING, "the layer, which reads it"),
            (RESUMED, "the layer, which writes it"),
            (RELATION, "the layer, which writes it"),
        ];
        let settings = [
            (INSTANCE_ID_FIELDS, &self.instance_ids),
            (RUN_ID_FIELDS, &self.run_ids),
            (PARENT_INSTANCE_ID_FIELDS, &self.parent_instance_ids),
            (STATUS_FIELDS, &self.statuses),
            (REPLAY_FIELD, &self.replaying),
            (REPLAY_CHILDREN_FIELD, &self.replaying_children),
        ];
        for (setting, names) in settings {
            for name in names {
                if name.is_empty() {
                    return Err(BuildError::EmptyName { setting });
                }
                add(&mut known, name, setting, setting)?;
            }
        }
        for preset in engines.iter().map(|engine| engine.preset()) {
            let name = |field: FieldName| field.name;
            let names = [
                (preset.instance_id.map(name), INSTANCE_ID_FIELDS),
                (preset.run_id, RUN_ID_FIELDS),
                (preset.parent_instance_id, PARENT_INSTANCE_ID_FIELDS),
                (preset.status, STATUS_FIELDS),
                (preset.replaying, REPLAY_FIELD),
                (preset.replaying_children.map(name), REPLAY_CHILDREN_FIELD),
            ];
            for (name, owner) in names {
                if let Some(name) = name {
                    add(&mut known, name, owner, "engine")?;
                }
            }
        }
        Ok(())
    }
}

/// Adds a name to the known ones, unless it has another owner.
fn add<'a>(
    known: &mut Vec<(&'a str, &'static str)>,
    name: &'a str,
    owner: &'static str,
    setting: &'static str,
) -> Result<(), BuildError> {
    match known.iter().find(|(known, _)| *known == name) {
        Some((_, other)) if *other != owner => Err(BuildError::TwoMeanings {
            setting,
            name: name.to_owned(),
            owner: other,
        }),
        Some(_) => Ok(()),
        None => {
            known.push((name, owner));
            Ok(())
        }
    }
}
