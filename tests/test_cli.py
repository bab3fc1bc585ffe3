"""The command line on files: predictions and evaluations are those of Python, for every task, encoding and column."""

import json

import numpy as np
import pandas as pd
import pytest
from small_learners import LABELS, TEXTS, answerer, bert, causal_lm, classifier, seq2seq, t5, tagger

from fastai_tl.all import *
from fastai_tl.cli import main
from repo import *


@pytest.fixture
def ask(tmp_path, monkeypatch, capsys):
    "Run a command in a temporary folder; return its status, standard output and standard error"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'cache'))

    def run_command(*args):
        capsys.readouterr()
        status = main([str(arg) for arg in args])
        return status, *capsys.readouterr()
    return run_command


def saved(learn, tmp_path, **kwargs):
    learn.save_bundle(tmp_path/'model', **kwargs)
    return load_bundle(tmp_path/'model', verbose=False)


def test_help_imports_neither_torch_nor_fastai():
    code = ('import resource, sys\nfrom fastai_tl.cli import main\n'
            'try:\n    main(["--help"])\nexcept SystemExit:\n    pass\n'
            'used = resource.getrusage(resource.RUSAGE_SELF)\n'
            'heavy = {"torch", "fastai", "pandas"} & set(sys.modules)\n'
            'print("\\n", sorted(heavy), used.ru_utime+used.ru_stime < 1.5)')
    assert python(code).stdout.split('\n')[-2].strip() == '[] True'


def test_file_of_a_classifier(ask, tmp_path, small_tokenizers):
    "All columns are kept as written, the labels and probabilities are those of the Predictor, formulas are text"
    pred = saved(classifier(small_tokenizers), tmp_path, temperature=2.)
    rows = pd.DataFrame(dict(Zimmer=['007', '=1+1', None], text=['the film', 'très bön', 'a plot'], n=['1', '02', '3']))
    rows.to_csv(tmp_path/'new.csv', index=False, sep=';', encoding='cp1252')
    assert ask('predict', 'model', 'new.csv', '--out', 'p.csv', '--sep', ';', '--encoding', 'cp1252')[0] == 0
    out = pd.read_csv(tmp_path/'p.csv', dtype=dict(Zimmer=str, n=str))
    assert list(out.columns) == ['Zimmer', 'text', 'n', 'predicted', 'confidence', 'p(a)', 'p(b)', 'p(c)']
    assert list(out.Zimmer[:2]) == ['007', "'=1+1"] and list(out.n) == ['1', '02', '3']
    right = pred.predict(list(rows.text))
    assert list(out.predicted) == right.labels
    assert np.allclose(out.filter(like='p('), right.probs, atol=1e-5)
    status, _, err = ask('predict', 'model', 'p.csv', '--out', 'q.csv')
    assert status == 1 and 'predicted, confidence' in err
    assert ask('predict', 'model', 'new.csv', '--out', 'p.xlsx')[0] == 1


@pytest.mark.parametrize('kind', ['multi', 'value'])
def test_several_labels_and_values(ask, tmp_path, small_tokenizers, kind):
    labels = [[label, 'd'] for label in LABELS] if kind == 'multi' else [float(i) for i in range(len(TEXTS))]
    learn = classifier(small_tokenizers, labels, data=kind)
    pred = saved(learn, tmp_path, **(dict(thresholds=[.1, .9, .5, .2]) if kind == 'multi' else {}))
    label = [';'.join(names) for names in labels] if kind == 'multi' else labels
    pd.DataFrame(dict(note=TEXTS, label=label)).to_csv(tmp_path/'rows.csv', index=False)
    assert ask('predict', 'model', 'rows.csv', '--text', 'note', '--out', 'p.jsonl', '--label-delim', '|')[0] == 0
    out = pd.read_json(tmp_path/'p.jsonl', lines=True)
    right = pred.predict(TEXTS)
    if kind == 'multi':
        assert list(out.predicted) == ['|'.join(names) for names in right.labels]
        assert np.allclose(out['p(a)'], right.probs[:, 0], atol=1e-5)
    else:
        assert np.allclose(out.predicted, right.scores[:, 0], atol=1e-5)
    status, printed, _ = ask('evaluate', 'model', 'rows.csv', '--text', 'note', '--label-delim', ';', '--out', 'report')
    scores = json.loads((tmp_path/'report'/'scores.json').read_text())
    assert status == 0 and 'report/index.html' in printed
    if kind == 'multi':
        is_right = [(c in names) == (c in true) for names, true in zip(right.labels, labels) for c in pred.classes]
        assert np.isclose(scores['accuracy'], np.mean(is_right))
    else:
        assert np.isclose(scores['rmse'], np.sqrt(np.mean((right.scores[:, 0]-labels)**2)), rtol=1e-4)


def test_pairs(ask, tmp_path, small_tokenizers):
    tok = small_tokenizers['encoder']
    df = pd.DataFrame(dict(premise=TEXTS, claim=TEXTS[::-1], label=LABELS))
    dls = HFTextDataLoaders.from_df(df, tok, text_col=['premise', 'claim'], bs=4, verbose=False)
    pred = saved(hf_classifier_learner(dls, bert(tok), metrics=[]), tmp_path)
    df.rename(columns=dict(claim='hypothesis')).to_csv(tmp_path/'rows.csv', index=False)
    names = ('--text', 'premise', '--text', 'hypothesis')
    assert ask('predict', 'model', 'rows.csv', *names, '--out', 'p.csv')[0] == 0
    right = pred.predict(list(zip(TEXTS, TEXTS[::-1])))
    assert list(pd.read_csv(tmp_path/'p.csv').predicted) == right.labels
    _, printed, _ = ask('evaluate', 'model', 'rows.csv', *names)
    scores = json.loads((tmp_path/'evaluation-rows'/'scores.json').read_text())
    assert np.isclose(scores['accuracy'], np.mean(np.array(right.labels) == LABELS))
    status, _, err = ask('predict', 'model', 'one text')
    assert status == 1 and 'two columns (premise and claim)' in err


def test_tags_answers_and_texts(ask, tmp_path, small_tokenizers):
    learn = tagger(small_tokenizers)
    learn.save_bundle(tmp_path/'tags')
    sentence = 'the film was very good'
    status, out, _ = ask('predict', 'tags', sentence)
    assert status == 0 and out.split('\t')[0] == ' '.join(learn.tag([sentence])[0].tags)
    rows = pd.DataFrame(dict(tokens=[['the', 'film']], tags=[['O', 'B-X']]))
    rows.to_json(tmp_path/'rows.jsonl', orient='records', lines=True)
    assert ask('evaluate', 'tags', 'rows.jsonl')[0] == 0
    learn = answerer(small_tokenizers)
    learn.save_bundle(tmp_path/'qa')
    pd.DataFrame(dict(question=['when'], context=[f'{TEXTS[0]} at noon'])).to_csv(tmp_path/'qa.csv', index=False)
    assert ask('predict', 'qa', 'qa.csv', '--out', 'a.csv')[0] == 0
    answer = pd.read_csv(tmp_path/'a.csv', keep_default_na=False).predicted[0]
    assert answer == learn.answer('when', f'{TEXTS[0]} at noon').text
    seq2seq(small_tokenizers, t5).save_bundle(tmp_path/'texts')
    assert ask('predict', 'texts', sentence)[0] == 0
    causal_lm(small_tokenizers).save_bundle(tmp_path/'lm')
    for command in ('predict', 'evaluate'):
        status, _, err = ask(command, 'lm', 'rows.jsonl')
        assert status == 1 and 'a language model (causal_lm)' in err and 'fastai-tl generate' in err


def test_train_on_a_file(ask, tmp_path, small_tokenizers):
    "Columns are found, nothing is drawn over where the output is no terminal, and `--quiet` shows table and folder"
    from transformers import BertForSequenceClassification
    tok = small_tokenizers['encoder']
    BertForSequenceClassification(bert(tok)).save_pretrained(tmp_path/'bert')
    tok.save_pretrained(tmp_path/'bert')
    words = dict(pos='good fine bright', neg='bad dull slow')
    rows = [dict(id=f'{i}{label}', review=f'the film was very {words[label].split()[i % 3]} story {i}', stars=label)
            for i in range(30) for label in words]
    pd.DataFrame(rows).to_csv(tmp_path/'mine.csv', index=False)
    (tmp_path/'settings.ini').write_text('[fastai_tl]\nmodel = bert\nepochs = 1\nbs = 8\n')
    status, printed, _ = ask('train', 'mine.csv')
    assert status == 0 and "Texts: column 'review'; labels: column 'stars'" in printed
    assert not set(printed) & set('\r█') and len(printed.splitlines()) < 40
    assert 'Step 1 of 2: The classifier: bert, fine-tuned' in printed and 'majority' not in printed
    assert 'fastai-tl predict trained-mine-bert new.csv' in printed
    folder = tmp_path/'trained-mine-bert'
    assert (folder/'report'/'index.html').exists() and load_bundle(folder/'model').classes == ['neg', 'pos']
    status, printed, _ = ask('train', 'mine.csv', '--quiet')
    assert status == 0 and printed.splitlines()[-1] == 'Results in trained-mine-bert'
    assert 'bert, fine-tuned' in printed and len(printed.splitlines()) <= 5
    status, _, err = ask('train', 'mine.csv', '--label', 'grade')
    assert status == 1 and "'grade'" in err
    pd.DataFrame(rows).assign(stars=[i / 7 for i in range(60)]).to_csv(tmp_path/'values.csv', index=False)
    status, _, err = ask('train', 'values.csv', '--label', 'stars')
    assert status == 1 and 'For a regression use Python' in err


@pytest.mark.slow
def test_train_in_two_processes(tmp_path, monkeypatch, small_tokenizers, capfd):
    "The files are those of one process, process 0 prints, and an error of both is printed by the one that ends first"
    from transformers import BertForSequenceClassification
    monkeypatch.chdir(tmp_path)
    tok = small_tokenizers['encoder']
    BertForSequenceClassification(bert(tok)).save_pretrained(tmp_path/'bert')
    tok.save_pretrained(tmp_path/'bert')
    texts = [f'the film was very {word} story {i}' for i in range(30) for word in ('good', 'bad')]
    rows = pd.DataFrame(dict(text=texts, label=['pos', 'neg']*30))
    rows.to_csv(tmp_path/'mine.csv', index=False)
    (tmp_path/'settings.ini').write_text('[fastai_tl]\nmodel = bert\nepochs = 2\nbs = 8\n')
    assert main(['train', 'mine.csv', '--quiet', '--out', 'one']) == 0
    capfd.readouterr()
    assert main(['train', 'mine.csv', '--quiet', '--out', 'two', '--processes', '2']) == 0
    printed = capfd.readouterr().out
    assert printed.splitlines()[-1] == 'Results in two' and printed.count('Results in') == 1
    one, two = [sorted(str(p.relative_to(tmp_path/out)) for p in (tmp_path/out).rglob('*') if p.is_file())
                for out in ('one', 'two')]
    assert one == two
    assert len(load_bundle(tmp_path/'two'/'model', verbose=False).predict(list(rows.text)).labels) == 60
    run = json.loads((tmp_path/'two'/'summary.json').read_text())
    assert run['rows'] == json.loads((tmp_path/'one'/'summary.json').read_text())['rows']
    assert main(['train', 'mine.csv', '--label', 'grade', '--processes', '2']) == 1
    assert capfd.readouterr().err.count("'grade'") in (1, 2) # process 0 prints its own; the other may end before it
    assert main(['train', 'mine.csv', '--processes', '0']) == 1
    assert '--processes' in capfd.readouterr().err


@pytest.mark.parametrize('sep', [';', '\t'])
def test_errors_name_options_of_the_command_line(ask, tmp_path, sep):
    "A file with another separator or encoding: the error names the option, and with it the file is read"
    rows = pd.DataFrame(dict(review=['schön, aber teuer', 'trüb', 'grün']*4, stars=['1', '2', '3']*4))
    rows.to_csv(tmp_path/'mine.csv', index=False, sep=sep, encoding='cp1252')
    status, _, err = ask('train', 'mine.csv')
    assert status == 1 and '`--encoding cp1252`' in err and 'encoding=' not in err
    for command in (['train'], ['quickstart', '--data']):
        status, _, err = ask(*command, 'mine.csv', '--encoding', 'cp1252')
        assert status == 1 and f'looks separated by {sep!r}' in err and f'on the command line `--sep {sep!r}`' in err
    status, _, err = ask('train', 'mine.csv', '--encoding', 'cp1252', '--sep', sep)
    assert status == 1 and 'Got review, stars' in err # it has columns now, without one of long texts


def test_predict_with_an_interrupted_run(ask, tmp_path, monkeypatch):
    "The error says that training is not finished and that the same command continues it"
    rows = [dict(text=f'the film was very {word} story {i}', label=word) for i in range(20) for word in ('good', 'bad')]
    pd.DataFrame(rows).to_csv(tmp_path/'mine.csv', index=False)

    def stop(*args, **kwargs):
        raise KeyboardInterrupt
    monkeypatch.setattr(ULMFiT, 'finetune_lm', stop)
    assert ask('train', 'mine.csv', '--model', 'ulmfit', '--no-general', '--out', 'run')[0] == 130
    status, _, err = ask('predict', 'run', 'a film')
    assert status == 1 and 'training is not finished' in err and 'same `fastai-tl train`' in err
    status, _, err = ask('predict', 'nothing', 'a film')
    assert status == 1 and 'not finished' not in err


def test_benchmark(ask, tmp_path):
    "A table on the screen and in a file; wrong options are found before anything is measured"
    (tmp_path/'file').touch()
    assert ask('benchmark', '--json', 'file/machine.json')[0] == 1
    status, _, err = ask('benchmark', '--threads', '0')
    assert status == 1 and '`--threads` must be' in err
    status, out, _ = ask('benchmark', '--quick', '--json', 'machine.json')
    figures = json.loads((tmp_path/'machine.json').read_text())
    assert status == 0 and figures['machine']['processor'] in out
    for title, rows in figures['results'].items():
        assert title in out
        base, *others = rows
        assert rows[base]['ratio'] == 1 and others
        for name in others:
            assert f"{rows[name]['ratio']:.2f} (" in out
            assert np.isclose(rows[name]['best'], rows[name]['per_second']/rows[base]['per_second'])
