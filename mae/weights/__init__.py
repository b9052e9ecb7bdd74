"""Weights of this and other libraries: read, put into a model, exported.

The path of a file, from `init=` to a model:

1. `files` opens it: a run, a checkpoint, timm's hub, a folder or file of another library. `unpickle` reads what
   `torch.save` wrote without running code in it.
2. `names` selects the weights among all tensors that the file holds, and takes the prefixes of wrappers off.
3. `networks` refuses a network that computes another function than ours, by the config beside the file (`timm`,
   `huggingface`) or by names and shapes.
4. `layouts` brings the tensors to the reference's names.
5. `read` gives the result, `PretrainedWeights`, with the sizes (`sizes`) and the preprocessing (`preprocessing`) that
   the files state.
6. `load` puts it into a model; `parts` adapts decoder, classifier, class token and positions.

The way out is `export`: `export_state` takes the tensors from the model, each format writes them to a temporary folder
(`export_files`) beside a model card (`export_card`).
"""
