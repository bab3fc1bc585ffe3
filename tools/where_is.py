#!/usr/bin/env python
"""Write the table "Where is …?" of CONTRIBUTING.md: what people look for, the name that does it, and its module.

    python tools/where_is.py            write it
    python tools/where_is.py --check    write nothing; exit 1 if it is not up to date

The modules are read off the code, so the table cannot point to a place that something has left."""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / 'fastai_tl'
START, END = '<!-- where is -->', '<!-- end -->'

# what people look for -> the function or class that does it
QUESTIONS = {
    'what is known about the data (task, classes, tokenizer, columns)': 'TextSpec',
    'the spec of a Learner that plain fastai or blurr made': 'spec_of',
    'reading tables and folders': 'read_table',
    'language model text that is larger than memory': 'tokenize_to_file',
    'labels: one class, several, a value': 'check_labels',
    'the random split': 'split_rows',
    'near-duplicates': 'near_duplicates',
    'padding': 'pad_rows',
    '`HFTextBlock`': 'HFTextBlock',
    'logits to probabilities': 'activate',
    'layer groups, tied weights': 'layer_groups',
    'the order in which a model uses its layers': 'execution_order',
    'vocabulary-aware encoders': 'Encoder',
    'frozen layers computed once': 'CachedPrefix',
    'mixed precision': 'AutocastPrecision',
    'freed memory kept for the next step': 'reuse_memory',
    'the optimizer, weight decay of norms and biases': 'LayerwiseOptimizer',
    'default learning rates': 'default_lr',
    'discriminative learning rates': 'discriminative_lrs',
    'slanted triangular rates': 'SchedSTLR',
    'Callbacks that only make a fit faster': 'fast_training_cbs',
    'a temperature from the training rows alone': 'held_out_temperature',
    'gradual unfreezing': 'GradualUnfreezing',
    'the weights of the best epoch': 'BestEpoch',
    'averaged weights': 'WeightAverage',
    'weights kept near the pre-trained ones': 'L2SP',
    'accumulated gradients of token means': 'LargeBatchGradient',
    'NaN in a training': 'StopOnNaN',
    'weights divided among processes': 'ShardedWeights',
    'resuming a killed run': 'ResumableFit',
    'several processes, several GPUs': 'ProcessRows',
    'values that several processes share': 'from_main_process',
    'locks for threads': 'exclusive',
    'the time of several ways to compute the same': 'interleaved_seconds',
    'checks of arguments: a number, a whole number, one of several names': 'check_number',
    'NaN in predictions': 'need_numbers',
    'the recipe that `fit_transfer` takes': 'choose_recipe',
    'classifiers from a few labels': 'few_shot_learner',
    'the supervised contrastive loss': 'supervised_contrastive_loss',
    'a bag of words': 'BagOfWords',
    'a classifier blended with a bag of words': 'Blend',
    'classification without training': 'LabelWordClassifier',
    'word vectors of word2vec, GloVe and fastText': 'StaticVectors',
    'learned weights of the layers of a model (ELMo)': 'ScalarMix',
    'an encoder for many languages': 'multilingual_encoder',
    'the architecture of the multilingual encoder': 'register_sentence_encoder',
    'tokens of SentencePiece': 'sentencepiece_tokenizer',
    'adversarial training': 'FGM',
    'training loops for plain PyTorch': 'gradual_unfreezing_training',
    'the three stages of ULMFiT': 'ULMFiT',
    'models with a text and an image tower': 'DualEncoder',
    'text generation': 'generate',
    'generation with an AWD_LSTM': 'stateful_model',
    'perplexity': 'text_perplexity',
    'control codes': 'ControlCodes',
    'preference tuning (DPO)': 'DPOLoss',
    'reinforcement learning (REINFORCE)': 'ReinforceLoss',
    'the class `Evaluation`': 'Evaluation',
    'evaluation during training': 'EvaluationCallback',
    'calibration: temperature': 'TemperatureScaling',
    'calibration: ECE': 'calibration_error',
    'confidence intervals of a report': 'share_interval',
    'tables for spreadsheets': 'write_csv',
    'decision thresholds': 'best_thresholds',
    'cross-validation': 'cross_validate',
    'the words that a prediction depends on': 'Attribution',
    'texts as a model reads them, with the tokens of each word': 'read_texts',
    'attention maps': 'AttentionMaps',
    'linear probes of the layers': 'probe_layers',
    'activation patching and ablation': 'InterventionEffects',
    'changed words that change a prediction': 'search_changes',
    'prediction of lists of texts': 'Predictor',
    'prediction of files in several processes': 'predict_files',
    'int8 weights': 'Int8Linear',
    'saving and loading a bundle': 'load_bundle',
    'checks of a bundle': 'check_bundle',
    'smaller models: fewer layers, units or heads': 'layer_losses',
    'bundles on the Hugging Face hub': 'download_bundle',
    'model cards': 'model_card',
    'ONNX files': 'ONNXEngine',
    'prediction without PyTorch': 'load_onnx',
    'checks of an ONNX file': 'check_onnx',
    'distillation': 'DistillationLoss',
    'scores of a teacher, kept on disk': 'TeacherScores',
    'new outputs for a trained head': 'add_outputs',
    'new words for a trained model': 'add_words',
    'a class-balanced sample of a stream': 'ClassReservoir',
    'learning without forgetting': 'LearningWithoutForgetting',
    'updates of a deployed model': 'Update',
    'drift of texts': 'Drift',
    'a server for a model': 'serve',
    'batches of several requests': 'BatchWorker',
    'blurr on today\'s libraries': 'enable_blurr',
    'energy and emissions of a training': 'EnergyCallback',
    'federated training, Flower': 'flower_client_app',
    'fonts for Chinese figures': 'find_cjk_font',
    'words of figures and reports in Chinese': 'in_words',
    'seeds': 'derive_seed',
    'errors': 'FastaiTLError',
}


def is_patch(node):
    "Is it a method for a class of another library?"
    return any('patch' in ast.unparse(decorator) for decorator in node.decorator_list)


def definitions():
    "{name: module} of every function, class and constant that a module defines at its top level"
    res = {}
    for path in sorted(PACKAGE.rglob('*.py')):
        module = '.'.join(path.relative_to(PACKAGE).with_suffix('').parts)
        if path.name.startswith('_') or module == 'all':
            continue
        for node in ast.parse(path.read_text(encoding='utf-8')).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not is_patch(node):
                res.setdefault(node.name, module)
    return res


def table():
    "The table as Markdown"
    where = definitions()
    lost = [name for name in QUESTIONS.values() if name not in where]
    if lost:
        sys.exit(f'tools/where_is.py names what no module defines: {lost}')
    rows = [f'| {question} | `{name}` | `{where[name]}` |' for question, name in QUESTIONS.items()]
    return '\n'.join(['| what | name | module |', '|---|---|---|', *rows])


def with_table(text):
    "CONTRIBUTING.md with the table in its place"
    before, rest = text.split(START, 1)
    after = rest.split(END, 1)[1]
    return f'{before}{START}\n{table()}\n{END}{after}'


if __name__ == '__main__':
    path = ROOT / 'CONTRIBUTING.md'
    old = path.read_text(encoding='utf-8')
    new = with_table(old)
    if '--check' not in sys.argv:
        path.write_text(new, encoding='utf-8')
    elif new != old:
        sys.exit('CONTRIBUTING.md is not up to date: python tools/where_is.py')
