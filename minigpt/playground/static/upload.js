// This script runs once for the error slot of the upload field; `element` is that slot. It refuses
// files above the limit before the browser sends them, and shows why in the slot. The page puts the
// two constants in front: LIMIT in bytes, and REFUSAL, HTML in which {} is the size in MB.

function check(event) {
  const files = event.type === "drop" ? event.dataTransfer.files : event.target.files;
  if (!files?.length) return;
  const size = [...files].reduce((sum, file) => sum + file.size, 0);
  props.value = size > LIMIT ? REFUSAL.replace("{}", Math.ceil(size / 1e6)) : "";
  if (!props.value) return;
  event.preventDefault(); // the browser would open a dropped file
  event.stopPropagation(); // the field would upload the files
  if (event.type === "change") event.target.value = ""; // the same file may be chosen again
  else event.target.dispatchEvent(new DragEvent("dragleave", { bubbles: true }));
}

const form = element.closest("#training-form");
for (const kind of ["change", "drop"]) form.addEventListener(kind, check, true);
